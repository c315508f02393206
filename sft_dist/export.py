"""The folder of a final model: the names of its files, how they are hashed, and its model card. Imports nothing heavy."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.files import read_json, write_text
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from sft_dist.config.schema import Config, ModelConfig, SourcePart

# The adapter's own files inside of model/; what was trained and what a fresh process found of it; the model card.
ADAPTER, PROOF, CARD = "adapter", "PROOF.json", "README.md"
# Rows of a grown vocabulary: products of matrices run fastest in multiples of it.
ROWS_OF = 64


def file_hash(path: Path) -> str:
    """The hash of a small file's content."""
    import xxhash

    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def write_card(run: RunDir, config: Config, versions: Mapping[str, str], folder: Path) -> None:
    """Write the card of the run's model into `folder`: what was trained from what, on what, how well it does, how to load it.

    The scores are those that there are by now; `versions` are those of the packages that it was made with.
    """
    scores = _scores(read_json(run.scores) or {})
    proof = read_json(folder / PROOF) or {}
    parts = [_front(config), _head(run, config, proof), _data(run), scores, _end(config, versions)]
    write_text(folder / CARD, "\n".join(part for part in parts if part))


def is_local(name: str) -> bool:
    """Whether a model's name is a folder of this machine, or was one of another: neither is for the public."""
    if name.startswith("embedded:"):
        return False
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def shown_name(name: str) -> str:
    """A base model's name for a card: of a folder only the last part."""
    return Path(name).expanduser().name if is_local(name) else name


def plain(text: str) -> str:
    """Words of data or of a config, on one line and without a meaning in Markdown or HTML."""
    on_a_line = " ".join(text.split())
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", on_a_line), quote=False)


def _code(text: str) -> str:
    """The same as code, in which no sign has a meaning but the one that ends it."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _front(config: Config) -> str:
    """The fields that Hugging Face's Hub reads."""
    base = config.model.name
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [sft, trl, sft-dist]"]
    if not base.startswith("embedded:") and not is_local(base):
        lines.append(f"base_model: {base}")
    lines.append(f"license: {_base_license(config.model) or 'unknown'}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _base_license(model: ModelConfig) -> str | None:
    """The licence that the base model's own card names, where that is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if model.name == "embedded:smollm2-135m":
        return "apache-2.0"
    local = Path(model.name) / CARD
    found = local if local.is_file() else None
    if found is None and not model.name.startswith("embedded:") and not is_local(model.name):
        cached = try_to_load_from_cache(model.name, CARD, revision=model.revision)
        found = Path(cached) if isinstance(cached, str) else None
    text = found.read_text(encoding="utf-8", errors="replace") if found else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:\s*([\w.+-]+)\s*$", match[1], re.MULTILINE) if match else None
    return named[1] if named else None


def _head(run: RunDir, config: Config, proof: dict[str, Any]) -> str:
    sources = ", ".join(_code(_named(part)) for part in config.data.train.parts)
    loss = "the assistant's words and end-of-turn tokens" if config.data.assistant_only_loss else "every token"
    stops = f"\n- {proof['stops']}" if "stops" in proof else ""
    return f"""# {plain(run.name)}

{_code(shown_name(config.model.name))} fine-tuned on {sources} with sft-dist.

{_settings(run, config)}
- loss on {loss}{_about_adapter(config.model)}{stops}

## Licences

The licences of the base model and of the data hold for this model, too.

- base model: {_base_license(config.model) or "unknown: nothing on the machine that trained it says"}
- data: unknown: whoever publishes this model has to say
"""


def _settings(run: RunDir, config: Config) -> str:
    """What the training was told, as a list: enough to do it again with this data."""
    train = config.train
    resolved = (read_json(run.env) or {}).get("resolved") or {}
    steps = f", at most {train.max_steps} steps" if train.max_steps else ""
    warmup = (
        f"{train.warmup_steps:g} steps" if train.warmup_steps >= 1 else f"{100 * train.warmup_steps:g} % of the steps"
    )
    plan = f"plan {resolved.get('plan', config.parallel.plan)}, {resolved.get('world_size', 1)} process(es)"
    optimizer = plain(str(train.extra.get("optim", "AdamW")))
    lines = [
        f"{plan}, {resolved.get('dtype', config.model.dtype)}, seed {config.run.seed}",
        f"{optimizer}, learning rate {train.learning_rate:g}, {train.lr_scheduler_type}, warm-up {warmup}",
        f"betas {train.adam_beta1:g} and {train.adam_beta2:g}, epsilon {train.adam_epsilon:g}",
        f"weight decay {train.weight_decay:g}, gradients clipped to {train.max_grad_norm:g}",
        f"{train.num_train_epochs:g} epoch(s){steps}",
        f"{train.global_batch_size} rows a step, up to {config.data.max_length} tokens a row"
        + (", packed" if config.data.packing else ""),
    ]
    if train.extra:  # their names: values may be paths of the machine
        lines.append(f"set beside these: {', '.join(_code(name) for name in train.extra)}")
    return "\n".join(f"- {line}" for line in lines)


def _named(part: SourcePart) -> str:
    """A source, without the folders of the machine that it was read on."""
    if part.path is None:
        return f"synthetic task {part.task}"
    return Path(part.path).name if Path(part.path).is_absolute() else part.path


def _data(run: RunDir) -> str:
    rows = (read_json(run.ledger) or {}).get("train")
    if not rows:
        return ""
    share = 100 * rows["trained_tokens"] / max(1, rows["tokens"])
    return f"""## Data

{rows["rows"]:,} rows, {rows["tokens"]:,} tokens, {share:.1f} % of them trained on.
"""


def _scores(scores: dict[str, Any]) -> str:
    """A table of every set's scores; before training only, if the tuned model has not been asked yet."""
    lines = []
    for name, part in (scores.get("sets") or {}).items():
        for metric, score in part["scores"].items():
            cells = [_cell(score.get(key), score.get(f"{key}_interval")) for key in ("before", "after", "change")]
            p_value = score.get("p_value")
            lines.append(
                [plain(name), str(part["n"]), plain(metric), *cells, "" if p_value is None else f"{p_value:.2g}"]
            )
    if not lines:
        return ""
    head = [["set", "rows", "score", "before", "after", "change", "p"], ["---"] * 7]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *lines])
    return f"""## Scores

On held-out rows, with 95 % bootstrap intervals; p is that of a paired test (exact McNemar or permutation).

{table}
"""


def _cell(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _end(config: Config, versions: Mapping[str, str]) -> str:
    numbers = "\n".join(f"- {name} {number}" for name, number in versions.items())
    return f"""## Use

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
    rslora = ", scaled by the square root of the rank" if lora.use_rslora else ""
    lines = [
        f"- LoRA of rank {lora.r}, alpha {lora.lora_alpha:g}, on {plain(targets)}, dropout {lora.lora_dropout:g}{rslora}; the adapter alone is in `{ADAPTER}/`"
    ]
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
    base = f"path/of/{shown_name(model.name)}" if is_local(model.name) else model.name
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = AutoModelForCausalLM.from_pretrained({base!r}{revision}, dtype="auto")
if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of={ROWS_OF})
model = PeftModel.from_pretrained(model, "path/of/this/folder/{ADAPTER}")
ask = pipeline("text-generation", model=model, tokenizer=tokenizer)"""
