"""SFTTrainer, assembled: the one place where a config becomes TRL's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from trl import SFTConfig, SFTTrainer

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.resolve import Resolved
from sft_dist.rundir import RunDir
from sft_dist.train import loss
from sft_dist.train.optimizer import MasterWeightAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from sft_dist.data.prepare import Prepared


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the loss and its gradient computed in one pass, for trained positions only.

    TRL 1.16 scores every position where there is no Triton, and computes the logits twice everywhere. Models whose
    head is not a plain linear map keep TRL's loss. Can go when TRL's head does the same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.one_pass = loss.supports(self.model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card would go beside the checkpoints; ours is published with the model."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's loss, normalised by the trained tokens of the whole accumulated batch."""
        if not self.one_pass or return_outputs or self.args.loss_type != "nll" or self.args.label_smoothing_factor:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if model.training else "eval"
        value, trained, correct = loss.trained_token_loss(model, inputs, num_items_in_batch)
        if mode == "train":
            mask = inputs.get("attention_mask")
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self._metrics[mode]["mean_token_accuracy"].append(int(correct) / max(1, int(trained)))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return value


def build_trainer(
    config: Config,
    resolved: Resolved,
    run: RunDir,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of a run, on rows that are already tokenised. Raises ConfigError if TRL refuses the settings."""
    from transformers import PrinterCallback, ProgressCallback

    keywords: dict[str, Any] = {}
    if resolved.dtype == "bfloat16":
        train = config.train
        keywords["optimizer_cls_and_kwargs"] = (
            MasterWeightAdamW,
            {"lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon},
        )
    try:
        trainer = Trainer(
            model=model,
            args=sft_config(config, resolved, run, has_eval=prepared.eval is not None),
            train_dataset=prepared.train,
            eval_dataset=prepared.eval,
            processing_class=tokenizer,
            callbacks=callbacks,
            **keywords,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TRL refuses these settings: {error}", hint="look at train.extra and model") from error
    # Progress, status and metrics are ours; these two would print over them.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def sft_config(config: Config, resolved: Resolved, run: RunDir, *, has_eval: bool) -> SFTConfig:
    """TRL's arguments for a run. Raises ConfigError if TRL or transformers refuse them."""
    train, checkpoint = config.train, config.checkpoint
    arguments: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "seed": config.run.seed,
        "use_cpu": resolved.plan == "cpu",
        # The weights are already in the type to compute in; autocast would only cast them again at every use.
        "bf16": False,
        "fp16": False,
        # What float32 products remain may use the matrix units, which came with the same GPUs as bfloat16.
        "tf32": True if resolved.plan == "single" and resolved.dtype == "bfloat16" else None,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_steps,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": resolved.per_device_train_batch_size,
        "per_device_eval_batch_size": train.per_device_eval_batch_size,
        "gradient_accumulation_steps": resolved.gradient_accumulation_steps,
        "gradient_checkpointing": resolved.gradient_checkpointing,
        "max_grad_norm": train.max_grad_norm,
        "weight_decay": train.weight_decay,
        "optim": "adamw_torch_fused",
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "logging_steps": train.logging_steps,
        "logging_first_step": True,
        # A non-finite loss is shown as it is: transformers would print the last good one in its place.
        "logging_nan_inf_filter": False,
        "eval_strategy": train.eval_strategy if has_eval else "no",
        "eval_steps": train.eval_steps,
        "save_strategy": checkpoint.save_strategy,
        "save_steps": checkpoint.save_steps or 500,
        # Rotation is ours: it waits for the manifest of the newer checkpoint.
        "save_total_limit": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "padding_free": resolved.padding_free,
        "report_to": "none",
        "disable_tqdm": True,
    }
    loss_type = train.extra.get("loss_type", "nll")
    if loss_type not in ("nll", "dft"):  # checked by SFTTrainer itself only once the model is there
        raise ConfigError(f"train.extra.loss_type {loss_type!r} is not one of nll, dft")
    try:
        return SFTConfig(**{**train.extra, **arguments})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"TRL refuses these settings: {error}", hint="look at train.extra and train") from error
