"""SFTTrainer with our loss, and the trainer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import SFTConfig

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.resolve import Resolved
from sft_dist.train import loss
from sft_dist.train.adapter import save_adapter
from sft_dist.train.optimizer import MasterWeightAdamW
from sft_dist.train.rows import WEIGHTS, Collator, EpochOrder, begin_each_epoch_anew, filled, rows_of_whole_steps
from sft_dist.train.saving import SavingTrainer, noted

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import Sampler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from sft_dist.data.prepared import Prepared

NO_WEIGHTS = (
    "the rows give messages weights, which TRL's own loss cannot take: train.extra or the model's head asks for it"
)


class Trainer(SavingTrainer):
    """SFTTrainer with the loss and its gradient computed in one pass, for trained positions only.

    TRL 1.16 scores every position where there is no Triton, computes the logits twice everywhere, and gathers four
    numbers from all processes in each micro batch; here they stay on the device until they are logged. Models whose
    head is not a plain linear map keep TRL's loss. Can go when TRL's head does the same.
    """

    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        mesh = self.accelerator.parallelism_config
        self.cuts_rows = mesh is not None and mesh.sp_enabled
        self.one_pass = loss.supports(model)
        self.own_loss = self.one_pass and self.args.loss_type == "nll" and not self.args.label_smoothing_factor
        if self.one_pass:
            loss.install(model)
            # transformers takes a loss over parts of rows for a mean of its micro batch; ours is a share of the step's.
            self.model_accepts_loss_kwargs = True
            self.data_collator = Collator(self.data_collator, cuts_rows=self.cuts_rows)
        self._parameters = 0
        self.filling = 0
        """Rows at the end of the training rows that only fill the last step of an epoch."""
        # Of an evaluation, on the device: the sum of the trained tokens' losses, and how many they are.
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        # Per mode, on the device: trained tokens, how many of them the model predicts, tokens.
        self._counts: dict[str, torch.Tensor] = {}
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and self.accelerator.mixed_precision == "bf16":
            # accelerate would also reduce gradients in bfloat16, and round the loss to it.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card would go beside the checkpoints; ours is published with the model."""

    @noted
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but in a checkpoint only the adapter, or what a sharded plan's own files do not hold.

        transformers would gather all weights on one process for each checkpoint; they are in the engine's shards.
        """
        sharded, adapter = self.is_deepspeed_enabled or self.is_fsdp_enabled, hasattr(self.model, "peft_config")
        if _internal_call and (sharded or adapter):
            if self.args.should_save and adapter and not sharded:
                save_adapter(self.model, Path(str(output_dir)))
            elif self.args.should_save:
                self.accelerator.unwrap_model(self.model).config.save_pretrained(output_dir)
            return
        super().save_model(output_dir, _internal_call=_internal_call)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, WEIGHTS])]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)  # type: ignore[no-any-return]
        rows = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(rows) - self.filling, self.filling, self.args.seed)

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, dataloader: Any = None) -> torch.nn.Module:
        wrapped: torch.nn.Module = super()._wrap_model(model, training, dataloader)
        if self.accelerator.ddp_handler is not None:
            # Gradients live in the buckets that are reduced: one copy instead of two. transformers has no field for it.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        return wrapped

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        begin_each_epoch_anew(loader, cuts_rows=self.cuts_rows)
        return model, loader

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations a token and parameter; transformers counts the parameters again in each micro batch (5 ms)."""
        if not self._parameters:
            self._parameters = self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)
        return 6 * self._parameters * int(inputs["input_ids"].numel())

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """The `amount` of the whole step over all processes; transformers knows no weights, nor rows that are cut."""
        if not self.cuts_rows and not any("weights" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        amount = sum(loss.amount(batch) for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(amount).to(device), "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's loss, normalised by the trained tokens of the whole global batch, or by the sum of their weights.

        With several processes it is multiplied by their number, as in transformers: the gradients are averaged.
        """
        if not self.own_loss or return_outputs:
            plain = {name: value for name, value in inputs.items() if name not in ("positions", "targets", "filling")}
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)
        value, trained, correct = loss.trained_token_loss(model, inputs, num_items_in_batch)
        mode = "train" if model.training else "eval"
        mask = inputs.get("attention_mask")
        tokens = (inputs["input_ids"].numel() if mask is None else mask.sum()) - inputs.get("filling", 0)
        counts = torch.stack([torch.as_tensor(count, device=value.device) for count in (trained, correct, tokens)])
        self._counts[mode] = self._counts[mode] + counts if mode in self._counts else counts
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes
        return self._averaged_by_engine(value) if mode == "train" else value

    def _averaged_by_engine(self, value: torch.Tensor) -> torch.Tensor:
        """`value`, its gradient such that the engine's average over processes is the sum over all of them.

        Where rows are cut, DeepSpeed 0.19 divides by all processes in stage 3 (coalesced_collectives.py), but in stages 1
        and 2 only by the groups of them (stage_1_and_2.py, sequence_parallel_size).
        """
        if not self.cuts_rows or self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            return value
        part: torch.Tensor = value / self.accelerator.parallelism_config.sp_size
        return part + (value - part).detach()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """As TRL's: the mean loss of a batch. It is noted with the trained tokens (or weights) that it is the mean of."""
        amount = loss.amount(inputs)
        value, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        count = amount.to(value.device, torch.float64)
        # TRL's own mean over no token at all is not a number.
        self._evaluated += torch.stack([torch.where(count > 0, value.double() * count, 0.0), count])
        return value, logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As transformers', but the loss is the mean over all trained tokens, whatever the batches and processes.

        transformers 5.23 repeats each batch's mean for its rows and takes the mean of those, so that a token of a short
        row counts more the fewer rows are beside it. Its `prediction_step` gets no `num_items_in_batch`
        (huggingface/transformers, Trainer.evaluation_loop); can go when the loop weighs a batch by its tokens.
        """
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, tokens = self.accelerator.reduce(self._evaluated, "sum").tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the counts of all processes since the last time to `logs`; every process must call it."""
        mode = "train" if self.model.training else "eval"
        counts = self._counts.pop(mode, None)
        if counts is not None:
            trained, correct, tokens = self.accelerator.reduce(counts, "sum").tolist()
            if mode == "train":
                self._total_train_tokens += tokens
            self._metrics[mode]["mean_token_accuracy"] = [correct / max(1, trained)]
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)


def build_trainer(
    config: Config,
    resolved: Resolved,
    arguments: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of a run, on rows that are already tokenised. Raises ConfigError if TRL refuses the settings."""
    from transformers import PrinterCallback, ProgressCallback

    keywords: dict[str, Any] = {}
    # TRL makes the adapters of 4-bit weights bfloat16, whatever the rest computes in.
    in_4_bits = config.model.lora is not None and config.model.lora.quantization != "none"
    if (resolved.dtype == "bfloat16" or in_4_bits) and resolved.layout.plan.engine in ("none", "ddp"):
        train = config.train
        keywords["optimizer_cls_and_kwargs"] = (
            MasterWeightAdamW,
            {"lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon},
        )
    pad = int(tokenizer.pad_token_id)
    rows, held_out = filled(prepared.train, rows_of_whole_steps(resolved), pad), prepared.eval
    if held_out is not None:
        held_out = filled(held_out, arguments.per_device_eval_batch_size * resolved.layout.world_size, pad)
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
            **keywords,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TRL refuses these settings: {error}", hint="look at train.extra and model") from error
    if WEIGHTS in rows.features and not trainer.own_loss:
        raise ConfigError(NO_WEIGHTS, hint="leave the weights out of the rows, or make them 0 or 1")
    trainer.filling = len(rows) - len(prepared.train)
    # Progress, status and metrics are ours; these two would print over them.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
