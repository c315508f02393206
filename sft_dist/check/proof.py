"""What a run would stumble over, looked at before there is one: step by step, by what the run itself will use."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from sft_dist.check.finding import Finding
from sft_dist.config.schema import Config
from sft_dist.errors import PreflightError
from sft_dist.parallel.batch import check_heads
from sft_dist.parallel.resolve import Resolved
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from sft_dist.data.example import Example

HeldOut = dict[str, list["Example"]]


def proving(config: Config, run: RunDir, resolved: Resolved, *, for_job: bool) -> Generator[Finding, None, HeldOut]:
    """Prove the config part by part; returns the held-out rows by set.

    Takes seconds and writes only to the cache; `for_job` fetches the weights, too: nodes may have no network. Raises
    ConfigError, PreflightError or DataError, as the run would later.
    """
    from sft_dist.train.settle import needs_packages

    needs_packages(config, resolved)
    yield Finding("packages", "ok", "all that this config needs are here")
    from sft_dist.data.prepare import prepare
    from sft_dist.evaluate.harness import prove_tasks
    from sft_dist.evaluate.held_out import held_out_rows
    from sft_dist.evaluate.positions import prove_positions
    from sft_dist.train.adapter import prove_adapter
    from sft_dist.train.arguments import sft_config
    from sft_dist.train.loadable import prove_loadable
    from sft_dist.train.model import fetch_model, find_model
    from sft_dist.train.pretrained import cache_root
    from sft_dist.train.tokenizer import load_tokenizer

    tokens = load_tokenizer(config.model)
    find_model(config.model)
    check_heads(config)  # resolve() has asked already where the model's config.json was here by then
    if for_job:
        fetch_model(config.model)
    else:  # nodes have other GPUs and packages than the machine that submits
        prove_loadable(config.model, resolved)
    prove_adapter(config.model, tokens, resolved.plan)
    yield Finding("model", "ok", f"{config.model.name}: tokenizer and weights are {'here' if for_job else 'to be had'}")
    prepared = prepare(config, tokens.tokenizer, tokens.template, cache_root())
    yield Finding("data", "ok", _rows(prepared.ledger))
    sft_config(config, resolved, run, has_eval=prepared.eval is not None, engine=False)
    yield Finding("training", "ok", "TRL takes the arguments")
    prove_tasks(config)
    held_out = held_out_rows(config, tokens.tokenizer)
    prove_positions(config, tokens.tokenizer, prepared, held_out)
    yield Finding("evaluation", "ok", _sets(config, held_out))
    return held_out


def _rows(ledger: dict[str, Any]) -> str:
    train = ledger["train"]
    trained = f"{100 * train['trained_tokens'] / max(1, train['tokens']):.1f} % trained"
    return f"{train['rows']:,} rows prepared, {train['tokens']:,} tokens, {trained}"


def _sets(config: Config, held_out: HeldOut) -> str:
    parts = [f"{name}: {len(rows)} rows" for name, rows in held_out.items()]
    parts += [f"task {name}" for name in (config.evaluate.harness.tasks if config.evaluate.harness else ())]
    if config.evaluate.questions:
        parts.append(f"questions: {len(config.evaluate.questions)}")
    return ", ".join(parts) or "nothing is asked"


def refuse_place(run: RunDir) -> None:
    """Raise PreflightError if the run's folder cannot be made where it would lie."""
    place = next(it for it in (run.path, *run.path.parents) if it.exists())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return
    why = "cannot be written to" if place.is_dir() else "is a file, not a folder"
    raise PreflightError(
        f"the run would lie in {run.path}, but {place} {why}",
        hint="choose another run.dir (or SFT_DIST_RUNS)",
    )


def preflight(config: Config, *, for_job: bool) -> Iterator[Finding]:
    """Every finding about a run of this config, here or in a job of SLURM. Raises SftDistError for the first problem."""
    from sft_dist.jobs.container_probe import prove_container
    from sft_dist.jobs.offline import take_caches_of_job
    from sft_dist.jobs.resources import job_machine, resolve_for_job
    from sft_dist.rundir import runs_root
    from sft_dist.train.disk import expected, shortage
    from sft_dist.train.settle import resolve_here

    if for_job:
        take_caches_of_job(config)
    if config.container.runtime != "none":
        prove_container(config, job=for_job)
        yield Finding("container", "ok", f"{config.container.image} in {config.container.runtime}")
    resolved = resolve_for_job(config) if for_job else resolve_here(config)
    note = job_machine(config)[1] if for_job else None
    for line in [*([note] if note else []), *resolved.decisions]:
        yield Finding("plan", "ok", line)
    run = RunDir(runs_root(config.run.dir) / str(config.run.name))
    refuse_place(run)
    if run.path.exists():
        yield Finding("run", "note", f"{run.path} is there already", "another run.name, or --overwrite")
    else:
        yield Finding("run", "ok", f"would lie in {run.path}")
    need = None if config.checkpoint.save_strategy == "no" else expected(run, config, resolved)
    if need is not None and (why := shortage(run.path, need)):
        raise PreflightError(f"a checkpoint {why}", hint="make room there, or choose another run.dir")
    yield from proving(config, run, resolved, for_job=for_job)
