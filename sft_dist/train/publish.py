"""The final model: written, read back, compared, and only then published as model/ with DONE."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.config.schema import Config, ModelConfig
from sft_dist.errors import CheckpointError
from sft_dist.files import publish_dir, read_json, utc_now, write_json
from sft_dist.rundir import RunDir
from sft_dist.train.adapter import ADAPTER, adapter_weights, merged, save_adapter
from sft_dist.train.environment import versions
from sft_dist.train.tokenizer import ROWS_OF

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sft_dist.parallel.resolve import Resolved
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.tokenizer import RunTokenizer
    from sft_dist.train.trainer import Trainer


def publish_model(
    run: RunDir, config: Config, resolved: Resolved, trainer: Trainer, tokens: RunTokenizer, ranks: Ranks
) -> None:
    """Put weights, tokenizer, model card and DONE into model/, all at once, from whatever shards the plan keeps.

    Of a LoRA run the adapter goes into model/adapter/, and model/ is the base model with the adapter merged into it, or
    no model of its own without `model.lora.merge`. Every process must call it; the main one gathers what was trained in
    host memory and writes. Raises CheckpointError if what was written is not what was trained.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = config.model.lora
    weights = whole_weights(trainer, model) if lora is None else adapter_weights(trainer, model, resolved.dtype)
    if ranks.is_main:
        if run.model.exists():  # without DONE it does not count; the caller has looked
            shutil.rmtree(run.model)
        with publish_dir(run.model) as staged:
            if lora is not None:
                save_adapter(model, staged / ADAPTER, weights)
                _compare(staged / ADAPTER, weights)
            if lora is not None and lora.merge:
                model = merged(config.model, tokens, staged / ADAPTER, resolved.dtype)
                weights = model.state_dict()
            if lora is None or lora.merge:
                model.save_pretrained(staged, state_dict=weights)
                # It names the type of the model's own weights, which are float32 masters under FSDP2.
                settings = read_json(staged / "config.json")
                write_json(staged / "config.json", {**settings, "dtype": resolved.dtype})
                _compare(staged, weights)
            tokens.tokenizer.save_pretrained(staged)
            (staged / "README.md").write_text(model_card(run, config), encoding="utf-8")
            (staged / "DONE").write_text(utc_now() + "\n", encoding="utf-8")
    ranks.barrier()


def whole_weights(trainer: Trainer, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every weight, whole, in the type that the model computes in; complete on the main process only."""
    import torch

    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        gathered = model.state_dict()
    weights = _tied_once(dict(gathered or {}), getattr(model, "all_tied_weights_keys", None) or {})
    if trainer.accelerator.mixed_precision != "bf16":
        return weights
    # FSDP2's shards are the float32 masters; what the model computes with, and every other plan publishes, is bfloat16.
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def _tied_once(weights: dict[str, torch.Tensor], tied: dict[str, str]) -> dict[str, torch.Tensor]:
    """Without the second name of a tied weight: gathering made a copy of it, which would be stored as another weight."""
    import torch

    twice = [
        name for name, source in tied.items() if name in weights and source in weights and name != source
        if torch.equal(weights[name], weights[source])
    ]  # fmt: skip
    return {name: weight for name, weight in weights.items() if name not in twice}


def model_card(run: RunDir, config: Config) -> str:
    """The model card: what was trained from what, on what, and how to load it."""
    source = ", ".join(part.path or f"synthetic task {part.task}" for part in config.data.train.parts)
    numbers = "\n".join(f"- {name} {number}" for name, number in versions().items())
    return f"""---
library_name: transformers
tags: [sft, trl, sft-dist]
---

# {run.name}

`{config.model.name}` fine-tuned on `{source}` with sft-dist. The run's config.yaml has every setting.

- learning rate {config.train.learning_rate:g}, {config.train.lr_scheduler_type}
- {config.train.num_train_epochs:g} epoch(s){f", at most {config.train.max_steps} steps" if config.train.max_steps else ""}
- {config.train.global_batch_size} rows a step, up to {config.data.max_length} tokens a row
- loss on {"the assistant's words and end-of-turn tokens" if config.data.assistant_only_loss else "every token"}{_about_adapter(config.model)}

```python
{_usage(config.model)}
print(ask([{{"role": "user", "content": "Hello"}}], return_full_text=False)[0]["generated_text"])
```

Made with

{numbers}
"""


def _about_adapter(model: ModelConfig) -> str:
    """Lines of the card on how the weights came about; none for a full fine-tuning."""
    lora = model.lora
    if lora is None:
        return ""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    lines = [f"- LoRA of rank {lora.r}, alpha {lora.lora_alpha:g}, on {targets}; the adapter alone is in `{ADAPTER}/`"]
    if lora.quantization != "none":
        lines.append(f"- trained beside base weights in 4 bits ({lora.quantization})")
    if lora.merge:
        unrounded = " as they were before the rounding to 4 bits" if lora.quantization != "none" else ""
        lines.append(f"- the adapter is merged into the base weights{unrounded}")
    return "\n" + "\n".join(lines)


def _usage(model: ModelConfig) -> str:
    """Python that makes `ask` of this folder."""
    if model.lora is None or model.lora.merge:
        return 'from transformers import pipeline\n\nask = pipeline("text-generation", model="path/of/this/folder")'
    revision = f", revision={model.revision!r}" if model.revision else ""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = AutoModelForCausalLM.from_pretrained({model.name!r}{revision}, dtype="auto")
if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of={ROWS_OF})
model = PeftModel.from_pretrained(model, "path/of/this/folder/{ADAPTER}")
ask = pipeline("text-generation", model=model, tokenizer=tokenizer)"""


def _compare(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    import torch
    from safetensors.torch import load_file

    written: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        written |= load_file(path)
    stored = {weights[name].data_ptr() for name in written if name in weights}
    for name, tensor in weights.items():
        # A tied tensor is stored once, under one of its names.
        if name not in written and tensor.data_ptr() not in stored:
            raise CheckpointError(f"{name} is missing from the final model as it was written to {folder}")
        if name in written and not torch.equal(written[name], tensor.cpu()):
            raise CheckpointError(f"{name}, read back from the final model, differs from what was trained")
