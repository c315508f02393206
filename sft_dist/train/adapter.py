"""LoRA: a low-rank adapter beside frozen weights. What it needs, where it goes, and how it is saved and loaded.

Adapters are made in the type that the model computes in, under every plan: the optimizer keeps float32 masters of them
(MasterWeightAdamW, DeepSpeed's bf16 optimizer, FSDP2's float32 shards), so that float32 copies of every activation, which
float32 adapters in a bfloat16 model would ask for, buy nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import ModelConfig
from sft_dist.config.schema_parallel import LoraConfig
from sft_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sft_dist.train.tokenizer import RunTokenizer
    from sft_dist.train.trainer import Trainer

# What FSDP's recomputing puts into the names of modules and parameters.
RECOMPUTING = "_checkpoint_wrapped_module."


def prove_adapter(model: ModelConfig, tokens: RunTokenizer, plan: str) -> None:
    """Raise ConfigError if the adapter that `model` asks for cannot be made; loads no weights. Needs PEFT."""
    if model.lora is None:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft_dist.train.pretrained import resolve_model

    trust = model.trust_remote_code
    found = AutoConfig.from_pretrained(resolve_model(model.name), revision=model.revision, trust_remote_code=trust)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(found, trust_remote_code=trust)
    check_names(empty, model.lora)
    _beside_layers(empty, model.lora, tokens, plan)


def check_names(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raise ConfigError for a name in target_modules or modules_to_save that no layer of the model has."""
    import torch

    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    wanted = () if isinstance(lora.target_modules, str) else lora.target_modules
    for field, names, among in (("target_modules", wanted, linear), ("modules_to_save", lora.modules_to_save, modules)):
        for name in names:
            if not any(known == name or known.endswith(f".{name}") for known in among):
                last = sorted({known.rpartition(".")[2] for known in linear})
                raise ConfigError(
                    f"model.lora.{field} holds {name!r}, but no {'linear layer' if among is linear else 'module'} of the "
                    "model has that name",
                    hint=f"the model's linear layers are {', '.join(last)}",
                )


def nf4(dtype: torch.dtype) -> Any:
    """transformers' settings for weights in 4 bits (QLoRA, Dettmers et al., 2023), computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def add_adapter(model: PreTrainedModel, spec: ModelConfig, tokens: RunTokenizer, *, plan: str, seed: int) -> PeftModel:
    """`model` with its weights frozen and the adapter that `spec.lora` describes; the same one for the same seed.

    The rows of tokens that the chat template added are trained too, since nothing has trained them yet. Not
    prepare_model_for_kbit_training for 4-bit weights: it makes norms, embeddings and head float32, and without autocast
    with them all activations. TRL 1.16 does without it as well.
    """
    from peft import LoraConfig as Settings
    from peft import TaskType, get_peft_model
    from transformers import set_seed

    lora = spec.lora
    assert lora is not None
    check_names(model, lora)
    set_seed(seed)
    _mend_peft(plan)
    settings = Settings(
        task_type=TaskType.CAUSAL_LM,
        revision=spec.revision,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        use_rslora=lora.use_rslora,
        **_beside_layers(model, lora, tokens, plan),
    )
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    # transformers resumes with PEFT's default, which would go on in float32.
    adapted.load_adapter = functools.partial(adapted.load_adapter, autocast_adapter_dtype=False)
    head = adapted.get_output_embeddings()
    if not hasattr(head, "bias") and getattr(head.original_module, "bias", None) is None:
        head.bias = None  # TRL's own loss asks for it, and PEFT's wrapper of a head with new tokens does not answer
    if plan == "zero3":
        # ZeRO-3 gathers a layer for the backward pass when the gradient of its input is asked for: the first one's never
        # is, where the embeddings are frozen. TRL asks for it with gradient checkpointing only, for another reason.
        adapted.enable_input_require_grads()
    return adapted


def _beside_layers(model: PreTrainedModel, lora: LoraConfig, tokens: RunTokenizer, plan: str) -> dict[str, Any]:
    """PEFT's settings for what is trained beside the linear layers: whole modules, and the rows of new tokens.

    Raises ConfigError where the plan cannot.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    ends = {name: module for name, module in model.named_modules() if module is embedding or module is head}
    whole = {name for name in ends if name.rpartition(".")[2] in lora.modules_to_save or name in lora.modules_to_save}
    settings: dict[str, Any] = {"modules_to_save": list(lora.modules_to_save) or None}
    ids = tokens.tokenizer.convert_tokens_to_ids(list(tokens.pieces))
    if tied and plan == "fsdp2" and (whole or ids):
        # accelerate 1.15 and torch 2.13 look for the one matrix under two names, which PEFT's wrappers hide.
        why = f"modules_to_save holds {' and '.join(sorted(whole))}" if whole else "tokens are added"
        raise ConfigError(
            f"model.lora would train the embeddings, since {why}, and the model's head is tied to them: plan fsdp2 cannot",
            hint="set parallel.plan=zero3, or ddp"
            + ("" if whole else ", or do without new tokens (model.chat_template, model.new_tokens)"),
        )
    if tied and whole:
        # One matrix stays one: PEFT trains the embedding and ties the head to it.
        return {**settings, "ensure_weight_tying": True}
    rows = {name: ids for name, module in ends.items() if name not in whole and not (tied and module is head)}
    return {**settings, "trainable_token_indices": rows} if ids and rows else settings


def _mend_peft(plan: str) -> None:
    """Let PEFT 0.21 find its parameters where ZeRO-3 and FSDP2 have put them."""
    from peft.tuners import trainable_tokens, tuners_utils
    from peft.utils.integrations import gather_params_ctx

    def collect(self: Any, weight: torch.Tensor, rows: list[int], embed_dim: int) -> torch.Tensor:
        with gather_params_ctx([weight], modifier_rank=None):
            return weight[rows].detach().clone()

    if plan == "zero3":
        # PEFT asks for the current CUDA device, also where there is none.
        trainable_tokens.TrainableTokensLayer._collect_token_weights = collect
    prefixes = tuners_utils._get_tuner_state_dict_key_prefixes
    if plan == "fsdp2" and not hasattr(prefixes, "__wrapped__"):
        # The names of modules hold the wrapper that recomputes activations, those in a state dict do not: PEFT would find
        # no parameter of its own, and a checkpoint of FSDP2 with gradient checkpointing would be empty.
        tuners_utils._get_tuner_state_dict_key_prefixes = functools.wraps(prefixes)(
            lambda *args, **kwargs: {name.replace(RECOMPUTING, "") for name in prefixes(*args, **kwargs)}
        )


def adapter_weights(trainer: Trainer, model: PeftModel, dtype: str) -> dict[str, torch.Tensor]:
    """The adapter, whole, by PEFT's names and in the type that it computes in; complete on the main process only.

    Every process must call it. The frozen weights stay where they are.
    """
    import torch
    from peft import get_peft_model_state_dict

    gathered: dict[str, Any] | None = None
    if trainer.is_fsdp_enabled:
        named = model.named_parameters(remove_duplicate=False)
        trained = {name.replace(RECOMPUTING, ""): weight for name, weight in named if weight.requires_grad}
        device = trainer.accelerator.device  # with offload they are in host memory, where NCCL gathers nothing
        gathered = {name: weight.detach().to(device).full_tensor().cpu() for name, weight in trained.items()}
    elif trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_partition_weights():
        # The call that transformers makes for PEFT models as well (Trainer.save_model); it gathers layer by layer.
        gathered = trainer.model_wrapped._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if trainer.args.process_index:
        return {}
    weights = get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=False)
    if len(weights) < sum(weight.requires_grad for weight in model.parameters()):
        raise CheckpointError(
            f"PEFT finds only {len(weights)} of the adapter's tensors: {', '.join(weights) or 'none'}"
        )
    # FSDP2's shards are the float32 masters.
    return {name: weight.detach().to(getattr(torch, dtype)) for name, weight in weights.items()}


def name_in_adapter(name: str) -> str:
    """What PEFT calls a trained parameter in the adapter's file: without the adapter's own name, and the wrapper's."""
    return f"{name}.".replace(".default.", ".").replace(".modules_to_save.", ".").removesuffix(".")


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter in PEFT's format: `weights` by PEFT's names, or those of `model`.

    Not the whole embeddings of a vocabulary that has grown, which PEFT adds by itself: their new rows are in it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if weights is None:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, since a tied matrix stands in it twice, which safetensors refuses.
    whole = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = model.peft_config["default"]
    was, settings.inference_mode = settings.inference_mode, True
    settings.save_pretrained(str(folder))
    settings.inference_mode = was


def with_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the adapter that `folder` holds, in float32, as PEFT loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
