"""What every `auto` of a config means on given processors, with the arithmetic behind each decision."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sft_dist.config.rules_parallel import parallel_problems
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.parallel.adopt import accumulated, adopt, value_of, with_values
from sft_dist.parallel.batch import check_during, check_heads, check_share, share_rows
from sft_dist.parallel.decide import (
    decide_attention,
    decide_compiled,
    decide_dtype,
    decide_plan,
    decide_processes,
    decide_threads,
)
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.resolved import Resolved
from sft_dist.parallel.told import Told
from sft_dist.parallel.world import World

if TYPE_CHECKING:
    from sft_dist.parallel.planner import Choice

__all__ = ["MEMORY", "Resolved", "one_process", "resolve", "with_rows"]

TOO_LARGE = "by this estimate it does not fit; `sft-dist plan` says what to change"
# Decisions that the rows' lengths may still change begin so.
MEMORY = "memory: "


# What a share of the rows depends on.
_SHARED = ("world_size", "use_cpu", "sequence_parallel_size")


def resolve(
    config: Config,
    machine: Machine,
    world: World | None = None,
    saved: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Resolved:
    """Decide every `auto` for `machine`, or for the processes of `world` where a launcher started some.

    `saved` are the facts of the checkpoint that the run goes on from, which stand where nothing else is said; `given` is
    the DeepSpeed file that it was launched with before. Raises ConfigError where the config asks for what is not there.
    """
    world = world or World()
    told = world.told or Told(deepspeed=given or {})
    notes: list[str] = []
    asked, adopted = adopt(config, told, notes)
    plan = decide_plan(asked, machine, world, notes, saved)
    use_cpu = plan == "cpu" or not machine.gpus
    processes = decide_processes(asked, machine, world, plan)
    dtype = decide_dtype(asked, machine, use_cpu, notes, saved)
    attention = decide_attention(asked, machine, use_cpu, dtype, notes)
    compiled = decide_compiled(asked, use_cpu, attention, notes)
    parallel = asked.parallel
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
    threads = decide_threads(asked, machine, processes, notes)
    undecided = Resolved(asked, layout, dtype, attention, 1, 1, False, compiled, threads, tuple(notes), adopted=adopted)
    resolved = _on_record(undecided, machine, plan, told, saved)
    if resolved.layout.plan.engine == "deepspeed":
        resolved = dataclasses.replace(resolved, given=told.deepspeed)
    _refuse_combinations(resolved)
    return resolved


def _on_record(
    resolved: Resolved, machine: Machine, plan: str, told: Told, saved: Mapping[str, Any] | None
) -> Resolved:
    """`resolved` with all that depends on how the rows are shared.

    With as many processes as before the micro batch and gradient checkpointing of the checkpoint stand where they are
    `auto`, so that the run goes on bit for bit, unless they do not fit on this hardware.
    """
    layout, config, notes = resolved.layout, resolved.config, list(resolved.decisions)
    check_share(config, layout)
    config = accumulated(config, told, layout.data_parallel_size, notes)
    now = {name: getattr(layout, name) for name in _SHARED}
    same = saved is not None and {name: saved.get(name) for name in _SHARED} == now
    share = config.train.global_batch_size // layout.data_parallel_size
    again = {
        name: saved[name.partition(".")[2]]
        for name in ("train.per_device_train_batch_size", "train.gradient_checkpointing")
        if saved is not None and same and value_of(config, name) == "auto"
        if not share % saved["per_device_train_batch_size"]  # else the config was edited
    }
    lines = [f"{name} = {value}: the checkpoint to go on from has it" for name, value in again.items()]
    pinned = dataclasses.replace(
        resolved, config=with_values(config, again), decisions=_last_word((*notes, *lines), len(notes))
    )
    if again and TOO_LARGE not in (fitted := _fitted(pinned, machine, plan)).decisions:
        return fitted
    return _fitted(dataclasses.replace(resolved, config=config, decisions=tuple(notes)), machine, plan)


def _refuse_combinations(resolved: Resolved) -> None:
    """ConfigError if what `auto` was decided to be cannot be combined with the rest; the loader knew no plan yet."""
    config = resolved.config
    if config.parallel.plan != "auto":
        return
    values = {"parallel.plan": resolved.plan, "train.gradient_checkpointing": resolved.gradient_checkpointing}
    problems = [problem.line for problem in parallel_problems(with_values(config, values))]
    if problems:
        raise ConfigError(f"parallel.plan = {resolved.plan} was chosen here, and", problems=problems)


def with_rows(resolved: Resolved, machine: Machine, ledger: Mapping[str, Any]) -> Resolved:
    """`resolved` once the rows are tokenised, whose counts `ledger` holds (`longest_row`, `tokens`, `rows`).

    What is `auto` and rests on the rows' length (micro batch, gradient checkpointing) then follows from the longest row
    instead of data.max_length; the plan stays. Returns `resolved` itself if nothing changes.
    """
    longest, mean = int(ledger["longest_row"]), ledger["tokens"] / max(1, ledger["rows"])
    before = len(resolved.decisions)
    refined = _fitted(resolved, machine, resolved.plan, longest, mean)
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
    resolved: Resolved, machine: Machine, plan: str, longest: int | None = None, mean: float | None = None
) -> Resolved:
    """`resolved` with plan, gradient checkpointing and micro batch decided: on GPUs by the planner."""
    config, layout, notes = resolved.config, resolved.layout, list(resolved.decisions)
    check_share(config, layout)
    check_heads(config)
    asked = config.train.gradient_checkpointing
    choice = None if layout.use_cpu else _choice(resolved, machine, plan, longest, mean)
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
    check_during(config, plan)
    return dataclasses.replace(
        resolved,
        layout=dataclasses.replace(layout, plan=PLANS[plan], gradient_checkpointing=checkpointing),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        decisions=tuple(notes),
    )


def _choice(resolved: Resolved, machine: Machine, plan: str, longest: int | None, mean: float | None) -> Choice | None:
    """What the planner chooses for the resolved processes; None for a model that it cannot count."""
    from sft_dist.parallel.hardware import gpu_model
    from sft_dist.parallel.planner import choose

    layout = resolved.layout
    fixed = with_values(resolved.config, {"parallel.plan": plan})
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
