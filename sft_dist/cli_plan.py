"""The body of `sft-dist plan`: a table of every plan, the one to choose, and what to change where none fits."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sft_dist.cli_data import ConfigArgument, Overrides, load
from sft_dist.rundir import runs_root

if TYPE_CHECKING:
    from rich.table import Table

    from sft_dist.parallel.estimate import Cluster, Estimate, Job

GIB = 2**30
# Characters that the whole table takes.
WIDE = 160


def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs on each node; those visible here if not given.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Their kind: h100, h200, a100-80, l40s, ...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Memory, disk and time by plan, and the fastest that fits. Example: sft-dist plan demo --gpus 8 --gpu h100"""
    from sft_dist.parallel.advice import advice
    from sft_dist.parallel.estimate import job_of
    from sft_dist.parallel.planner import allowed, best, plan_all

    settings = load(config, overrides).config
    cluster, note = _cluster(settings.parallel.num_processes, gpus, gpu, nodes)
    job = job_of(settings)
    estimates = plan_all(job, cluster)
    chosen = best(allowed(job, cluster, estimates))
    lines = advice(job, cluster)
    if as_json:
        typer.echo(json.dumps(_facts(job, cluster, estimates, chosen, lines), indent=2))
        return
    from rich.console import Console

    # Where nothing says how wide the lines may be (a pipe), the table keeps its columns.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, width=None if known else WIDE)
    typer.echo("\n".join(_heading(job, cluster, note)))
    for table in _tables(estimates, chosen, console.width):
        console.print(table)
    reasons = dict.fromkeys(found.refused for found in estimates if found.refused)
    refused = [f"- {why}: {', '.join(dict.fromkeys(e.name for e in estimates if e.refused == why))}" for why in reasons]
    typer.echo("\n".join(_conclusion(job, cluster, chosen, refused, lines)))


def _cluster(processes: int | str, gpus: int | None, gpu: str | None, nodes: int) -> tuple[Cluster, str]:
    """The GPUs to plan for, and how they were found."""
    from sft_dist.parallel.estimate import Cluster
    from sft_dist.parallel.hardware import gpu_model, gpu_named
    from sft_dist.parallel.machine import this_machine

    asked = gpus or (processes if isinstance(processes, int) else None)
    if gpu is not None:
        return Cluster(gpu_named(gpu), asked or 1, nodes), "as asked for"
    visible = this_machine().gpus
    if visible:
        return Cluster(gpu_model(visible[0]), asked or len(visible), nodes), f"{len(visible)} visible here"
    return Cluster(
        gpu_named("h100"), asked or 1, nodes
    ), "no GPU is visible here: planned for h100; --gpu names another"


def _heading(job: Job, cluster: Cluster, note: str) -> Iterator[str]:
    architecture, rows, config = job.architecture, job.rows, job.config
    adapter = f", LoRA of rank {config.model.lora.r}" if config.model.lora is not None else ""
    yield (
        f"{config.model.name}: {architecture.total_params:,} parameters, {architecture.layers} layers of "
        f"{architecture.hidden}, {architecture.family} ({job.origin}){adapter}"
    )
    yield f"GPUs: {cluster}; {note}"
    yield (
        f"rows: {rows.origin}; longest {rows.longest}, mean {rows.mean:.0f} tokens; "
        f"global_batch_size {config.train.global_batch_size}"
    )


def _tables(estimates: list[Estimate], chosen: Estimate | None, width: int) -> Iterator[Table]:
    """One table where `width` columns hold it, else the memory by part in a second one."""
    columns = {
        name: ["-" if found.refused and name not in ("plan", "recompute") else cell(found) for found in estimates]
        for name, cell in _COLUMNS.items()
    }
    groups = [list(_COLUMNS)]
    if width < WIDE:
        memory = ("params", "grads", "optim", "activ", "head", "buffers", "host", "ckpt")
        first = [name for name in _COLUMNS if name not in (*memory, "MFU")]
        groups = [first, ["plan", "recompute", *memory]]
    for names in groups:
        yield _table({name: columns[name] for name in names}, None if chosen is None else estimates.index(chosen))


def _table(columns: dict[str, list[str]], chosen: int | None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="left" if name in ("plan", "recompute") else "right", no_wrap=True)
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(">" if number == chosen else "", *row, style="bold" if number == chosen else None)
    return table


def _verdict(found: Estimate) -> str:
    return "yes" if found.comfortable else "tight" if found.fits else "no"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _sent(found: Estimate) -> str:
    sent = found.time.sent
    return _short(sent.inside / 1e9) + (f" + {_short(sent.across / 1e9)}" if sent.across else "")


def _part(name: str) -> Callable[[Estimate], str]:
    return lambda found: _short(getattr(found.memory, name) / GIB)


# Memory in GiB: of a GPU (needed of usable, then by part), of a node's host, of a checkpoint. Sent: GB a step and GPU,
# inside the node + across nodes.
_COLUMNS: dict[str, Callable[[Estimate], str]] = {
    "plan": lambda found: found.name.removesuffix(" offload"),
    "recompute": lambda found: "yes" if found.layout.gradient_checkpointing else "no",
    "fits": _verdict,
    "batch": lambda found: f"{found.batch.rows} x {found.batch.accumulation}",
    "GPU GiB": lambda found: f"{_short(found.memory.needed / GIB)}/{found.usable / GIB:.0f}",
    "params": _part("parameters"),
    "grads": _part("gradients"),
    "optim": _part("optimizer"),
    "activ": _part("activations"),
    "head": _part("head"),
    "buffers": _part("buffers"),
    "host": lambda found: f"{found.host / GIB:.0f}",
    "ckpt": lambda found: _short(found.checkpoint / GIB),
    "sent": _sent,
    "s/step": lambda found: f"{found.time.seconds:.2f}",
    "tok/s/GPU": lambda found: f"{found.time.tokens_per_s_per_gpu:,.0f}",
    "MFU": lambda found: f"{found.time.mfu:.0%}",
    "total": lambda found: duration(found.total_seconds),
}


def duration(seconds: float | None) -> str:
    """Seconds in words: "35 s", "12 min", "3.4 h", "2.1 d"; "?" for None."""
    if seconds is None:
        return "?"
    for size, unit, digits in ((86400.0, "d", 1), (3600.0, "h", 1), (60.0, "min", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _conclusion(
    job: Job, cluster: Cluster, chosen: Estimate | None, refused: list[str], advice: list[str]
) -> Iterator[str]:
    from sft_dist.parallel.planner import arithmetic

    yield from refused
    if chosen is None:
        yield f"nothing that the config allows fits on {cluster}{'; what would:' if advice else ''}"
        yield from (f"  {line}" for line in advice)
        return
    yield from arithmetic(job, cluster, chosen)
    if chosen.steps is None:
        rows = 1000 / job.config.train.global_batch_size
        yield f"time: {duration(rows * chosen.time.seconds)} for 1000 rows; the number of rows is not known"
    else:
        yield f"time: {chosen.steps} steps x {chosen.time.seconds:.2f} s = {duration(chosen.total_seconds)}"
    keep = job.config.checkpoint.keep
    folder, free = _free_bytes(job)
    verdict = "" if chosen.disk <= free else " - NOT ENOUGH"
    saved = f"{keep} + 1 checkpoints of {chosen.checkpoint / GIB:.1f} GiB and the model"
    if job.config.checkpoint.save_strategy == "no":
        saved = "the model, no checkpoints"
    yield f"disk: {saved}: {chosen.disk / GIB:.1f} GiB of {free / GIB:.1f} GiB free at {folder}{verdict} (quotas unseen)"
    yield f"host memory: {chosen.host / GIB:.0f} GiB a node"
    yield f"files: {', '.join(_files(job, chosen))}"


def _free_bytes(job: Job) -> tuple[Path, int]:
    """The nearest folder that exists on the way to the run's, and the bytes free on its file system."""
    folder = runs_root(job.config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free


def _files(job: Job, chosen: Estimate) -> list[str]:
    """The paths that a run with this plan would write to."""
    run = runs_root(job.config.run.dir) / str(job.config.run.name)
    deepspeed = ["plan/deepspeed.json"] if chosen.layout.plan.engine == "deepspeed" else []
    saves = [] if job.config.checkpoint.save_strategy == "no" else ["checkpoints/checkpoint-N/"]
    names = ["config.yaml", "plan/accelerate.yaml", *deepspeed, "plan/predicted.json", *saves, "model/"]
    return [f"{run}/{name}" for name in names]


def _facts(
    job: Job, cluster: Cluster, estimates: list[Estimate], chosen: Estimate | None, advice: list[str]
) -> dict[str, Any]:
    from sft_dist.parallel.planner import arithmetic

    architecture, rows = job.architecture, job.rows
    folder, free = _free_bytes(job)
    return {
        "model": {
            "name": job.config.model.name,
            "origin": job.origin,
            "parameters": architecture.total_params,
            "matmul_parameters": architecture.matmul_params,
            "layers": architecture.layers,
            "hidden": architecture.hidden,
            "vocabulary": architecture.vocab,
        },
        "cluster": {
            "gpu": cluster.gpu.name,
            "gpus_per_node": cluster.gpus_per_node,
            "nodes": cluster.nodes,
            "memory_gib": cluster.gpu.memory_gib,
            "network_gbps_per_gpu": cluster.gpu.network_gbps,
        },
        "rows": {"count": rows.count, "longest": rows.longest, "mean": rows.mean, "origin": rows.origin},
        "estimates": [found.facts() for found in estimates],
        "chosen": None if chosen is None else estimates.index(chosen),
        "arithmetic": [] if chosen is None else list(arithmetic(job, cluster, chosen)),
        "advice": advice,
        "disk": {"folder": str(folder), "free_gib": round(free / GIB, 3)},
        "files": [] if chosen is None else _files(job, chosen),
    }
