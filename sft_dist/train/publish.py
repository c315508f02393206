"""The final model: written, read back, compared, and only then published as model/ with DONE."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError
from sft_dist.files import publish_dir, utc_now
from sft_dist.rundir import RunDir
from sft_dist.train.environment import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def publish_model(run: RunDir, config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put weights, tokenizer, model card and DONE into model/, all at once.

    Raises CheckpointError if what was written is not what was trained.
    """
    if run.model.exists():  # without DONE it does not count; the caller has looked
        shutil.rmtree(run.model)
    with publish_dir(run.model) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        _compare(staged, model)
        (staged / "README.md").write_text(model_card(run, config), encoding="utf-8")
        (staged / "DONE").write_text(utc_now() + "\n", encoding="utf-8")


def model_card(run: RunDir, config: Config) -> str:
    """The model card: what was trained from what, on what, and how to load it."""
    source = config.data.train.path or f"synthetic task {config.data.train.task}"
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
- loss on {"the assistant's words and end-of-turn tokens" if config.data.assistant_only_loss else "every token"}

```python
from transformers import pipeline

ask = pipeline("text-generation", model="path/of/this/folder")
print(ask([{{"role": "user", "content": "Hello"}}], return_full_text=False)[0]["generated_text"])
```

Made with

{numbers}
"""


def _compare(folder: Path, model: PreTrainedModel) -> None:
    import torch
    from safetensors.torch import load_file

    written: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        written |= load_file(path)
    state = model.state_dict()
    stored = {state[name].data_ptr() for name in written if name in state}
    for name, tensor in state.items():
        # A tied tensor is stored once, under one of its names.
        if name not in written and tensor.data_ptr() not in stored:
            raise CheckpointError(f"{name} is missing from the final model as it was written to {folder}")
        if name in written and not torch.equal(written[name], tensor.cpu()):
            raise CheckpointError(f"{name}, read back from the final model, differs from what was trained")
