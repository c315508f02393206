"""What every `auto` of a config means on given processors, with the arithmetic behind each decision."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sft_dist.config.rules_parallel import parallel_problems
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.parallel.batch import check_share, share_rows
from sft_dist.parallel.compiling import VARLEN
from sft_dist.parallel.decide import (
    decide_attention,
    decide_compiled,
    decide_dtype,
    decide_plan,
    decide_processes,
)
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.world import World

if TYPE_CHECKING:
    from sft_dist.parallel.planner import Choice

TOO_LARGE = "by this estimate it does not fit; `sft-dist plan` says what to change"
# Decisions that the rows' lengths may still change begin so.
MEMORY = "memory: "


@dataclass(frozen=True)
class Resolved:
    """The values that `auto` stands for, and one line on each decision."""

    layout: Layout
    dtype: Literal["float32", "bfloat16"]
    attn_implementation: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    compile_layers: bool
    num_threads: int
    """Threads of one process on the CPU."""
    decisions: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    """The DeepSpeed file that the user launched with; what it sets stands."""

    @property
    def plan(self) -> str:
        return self.layout.plan.name

    @property
    def use_cpu(self) -> bool:
        return self.layout.use_cpu

    @property
    def loading_dtype(self) -> str:
        """The type in which the weights are read: FSDP2's shards are the float32 masters themselves."""
        return "float32" if self.layout.plan.engine == "fsdp2" else self.dtype

    @property
    def padding_free(self) -> bool:
        """Whether a batch is one long row without padding, its documents told apart by their lengths."""
        return self.attn_implementation == VARLEN

    def facts(self) -> dict[str, Any]:
        """The values as JSON, without the decisions."""
        values = {name: getattr(self, name) for name in _PLAIN}
        layout = {name: getattr(self.layout, name) for name in _LAYOUT}
        return {"plan": self.plan, **layout, **values}


_PLAIN = (
    "dtype",
    "attn_implementation",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "compile_layers",
    "num_threads",
)
_LAYOUT = (
    "nodes",
    "processes_per_node",
    "world_size",
    "use_cpu",
    "offload",
    "hybrid_shard",
    "sequence_parallel_size",
)


def resolve(config: Config, machine: Machine, world: World | None = None) -> Resolved:
    """Decide every `auto` for `machine`, or for the processes of `world` where a launcher started some.

    Raises ConfigError where the config asks for what is not there.
    """
    world = world or World()
    notes: list[str] = []
    plan = decide_plan(config, machine, world, notes)
    use_cpu = plan == "cpu" or not machine.gpus
    processes = decide_processes(config, machine, world, plan)
    dtype = decide_dtype(config, machine, use_cpu, notes)
    attention = decide_attention(config, machine, use_cpu, dtype, notes)
    compiled = decide_compiled(config, use_cpu, attention, notes)
    parallel = config.parallel
    layout = Layout(
        PLANS["cpu" if plan == "auto" else plan],
        nodes=world.nodes,
        processes_per_node=processes,
        use_cpu=use_cpu,
        dtype=dtype,
        gradient_checkpointing=False,
        compile_layers=compiled,
        offload=parallel.offload,
        nvme_path=parallel.nvme_path,
        hybrid_shard=parallel.hybrid_shard,
        sequence_parallel_size=parallel.sequence_parallel_size,
    )
    threads = max(1, machine.cores // processes)
    undecided = Resolved(layout, dtype, attention, 1, 1, False, compiled, threads, tuple(notes), world.deepspeed or {})
    resolved = _fitted(config, undecided, machine, plan)
    _refuse_combinations(config, resolved)
    return resolved


def _refuse_combinations(config: Config, resolved: Resolved) -> None:
    """ConfigError if what `auto` was decided to be cannot be combined with the rest; the loader knew no plan yet."""
    if config.parallel.plan != "auto":
        return
    decided = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"plan": resolved.plan}),
            "train": config.train.model_copy(update={"gradient_checkpointing": resolved.gradient_checkpointing}),
        }
    )
    problems = [problem.line for problem in parallel_problems(decided)]
    if problems:
        raise ConfigError(f"parallel.plan = {resolved.plan} was chosen here, and", problems=problems)


def with_rows(config: Config, resolved: Resolved, machine: Machine, ledger: Mapping[str, Any]) -> Resolved:
    """`resolved` once the rows are tokenised, whose counts `ledger` holds (`longest_row`, `tokens`, `rows`).

    What is `auto` and rests on the rows' length (micro batch, gradient checkpointing) then follows from the longest row
    instead of data.max_length; the plan stays. Returns `resolved` itself if nothing changes.
    """
    longest, mean = int(ledger["longest_row"]), ledger["tokens"] / max(1, ledger["rows"])
    before = len(resolved.decisions)
    refined = _fitted(config, resolved, machine, resolved.plan, longest, mean)
    same = refined.facts() == resolved.facts()
    return resolved if same else dataclasses.replace(refined, decisions=_last_word(refined.decisions, before))


def _last_word(decisions: tuple[str, ...], before: int) -> tuple[str, ...]:
    """The decisions without those of the first `before` that a later one replaces (on the same subject)."""
    later = {_subject(line) for line in decisions[before:]}
    kept = [line for line in decisions[:before] if _subject(line) not in later]
    if "memory" in later:
        kept = [line for line in kept if line != TOO_LARGE]
    return (*kept, *decisions[before:])


def _subject(line: str) -> str:
    """What a decision is about: the field before ` = `, or the word before the colon."""
    return re.split(r" = |: ", line, maxsplit=1)[0]


def _fitted(
    config: Config,
    resolved: Resolved,
    machine: Machine,
    plan: str,
    longest: int | None = None,
    mean: float | None = None,
) -> Resolved:
    """`resolved` with plan, gradient checkpointing and micro batch decided: on GPUs by the planner."""
    layout, notes = resolved.layout, list(resolved.decisions)
    check_share(config, layout)
    asked = config.train.gradient_checkpointing
    choice = None if layout.use_cpu else _choice(config, resolved, machine, plan, longest, mean)
    if choice is not None:
        notes += choice.lines
        plan, checkpointing = choice.plan, choice.gradient_checkpointing
        micro, accumulation = choice.per_device_train_batch_size, choice.gradient_accumulation_steps
        if not choice.fits:
            notes.append(TOO_LARGE)
    else:
        if plan == "auto":  # a model that the planner cannot count: shard everything, which needs the least
            plan = "fsdp2" if layout.world_size > 1 else "single"
            notes.append(f"parallel.plan = {plan}: the planner cannot count this model")
        checkpointing = asked if asked != "auto" else not layout.use_cpu
        if asked == "auto":
            why = "host memory is ample and recomputing costs a third" if layout.use_cpu else "GPU memory is the limit"
            notes.append(f"train.gradient_checkpointing = {str(checkpointing).lower()}: {why}")
        micro, accumulation = share_rows(config, layout, notes, longest)
    return dataclasses.replace(
        resolved,
        layout=dataclasses.replace(layout, plan=PLANS[plan], gradient_checkpointing=checkpointing),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        decisions=tuple(notes),
    )


def _choice(
    config: Config, resolved: Resolved, machine: Machine, plan: str, longest: int | None, mean: float | None
) -> Choice | None:
    """What the planner chooses for the resolved processes; None for a model that it cannot count."""
    from sft_dist.parallel.hardware import gpu_model
    from sft_dist.parallel.planner import choose

    layout = resolved.layout
    fixed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"plan": plan})})
    gpu = gpu_model(machine.gpus[0])
    try:
        return choose(
            fixed, layout.processes_per_node, gpu, layout.nodes, longest=longest, mean=mean, dtype=resolved.dtype
        )
    except PreflightError:
        return None


def one_process(config: Config) -> Config:
    """`config` for a process of its own that only answers questions: on the first GPU, else on the CPU."""
    alone = {"plan": "cpu" if config.parallel.plan == "cpu" else "auto", "num_processes": 1, "offload": "none"}
    reset = {"nvme_path": None, "hybrid_shard": False, "sequence_parallel_size": 1}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={**alone, **reset})})
