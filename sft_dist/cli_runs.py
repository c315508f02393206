"""The runs that `sft-dist submit` hands over: new ones, proven for the nodes that they will get, or stopped ones."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sft_dist.cli_data import load
from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from sft_dist.config.loader import LoadedConfig
    from sft_dist.config.schema import Config
    from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)


def made_run(
    source: str, overrides: Sequence[str], *, overwrite: bool, local: bool = False, accept: bool = False
) -> tuple[RunDir, Config]:
    """The run to submit: a new one of a config, or the stopped one that `source` names; with `accept` on changed data too."""
    from sft_dist.train.resume import accept_change

    run = existing(source)
    if run is not None:
        config = _proven_again(run, ready_again(run, overrides), local=local)
        if accept:
            accept_change(run)
        return run, config
    if accept:
        raise ConfigError(f"--accept-change is for a run that goes on, and {source} is none")
    return new_run(load(source, list(overrides)), overwrite=overwrite, local=local)


def new_run(loaded: LoadedConfig, *, overwrite: bool, local: bool = False) -> tuple[RunDir, Config]:
    """A run of this config, proven; its decisions are logged. Raises what `stages.new_run` raises."""
    from sft_dist.jobs.container_probe import prove_container
    from sft_dist.jobs.offline import take_caches_of_job
    from sft_dist.jobs.resources import job_machine, resolve_for_job
    from sft_dist.jobs.submit import local_gpus
    from sft_dist.stages import new_run as create

    if local:
        _refuse_image(loaded.config)
        if loaded.config.slurm.nodes > 1:
            raise ConfigError(
                f"slurm.nodes is {loaded.config.slurm.nodes}, but --local has one", hint="add slurm.nodes=1"
            )
        local_gpus(loaded.config.slurm)
    take_caches_of_job(loaded.config)
    prove_container(loaded.config, job=True)
    resolved = resolve_for_job(loaded.config)
    note = job_machine(loaded.config)[1]
    for line in [*([note] if note else []), *resolved.decisions]:
        log.info("%s", line)
    run = create(loaded, overwrite=overwrite, resolved=resolved)
    if not local:
        _warn_of_own_disks(loaded.config, run)
    return run, loaded.config


def _proven_again(run: RunDir, config: Config, *, local: bool) -> Config:
    """`config` of a stopped run, once it is known that what its nodes need is still here."""
    from sft_dist.jobs.container_probe import prove_container
    from sft_dist.jobs.offline import take_caches_of_job
    from sft_dist.jobs.resources import resolve_for_job
    from sft_dist.stages import prove

    if local:
        _refuse_image(config)
    take_caches_of_job(config)
    prove_container(config, job=True)
    prove(config, run, resolve_for_job(config), for_job=True)
    return config


def _refuse_image(config: Config) -> None:
    runtime = config.container.runtime
    if runtime != "none":
        raise ConfigError(
            f"container.runtime is {runtime}, and --local starts no image",
            hint="sft-dist train, which does with docker and apptainer; or container.runtime=none",
        )


def _warn_of_own_disks(config: Config, run: RunDir) -> None:
    """Only a warning: a cluster of one machine shares every disk with itself."""
    from sft_dist.jobs.offline import out_of_sight

    hidden = out_of_sight(config, run)
    if hidden:
        log.warning(
            "on this host's own disk, where other nodes do not look: %s; choose a shared one by run.dir, SFT_DIST_CACHE "
            "and HF_HOME",
            ", ".join(hidden),
        )


def existing(source: str) -> RunDir | None:
    """The run that `source` is the folder of, or, where no config has that name, the name of."""
    from sft_dist.config.loader import list_recipes
    from sft_dist.rundir import RunDir, find_run

    if (Path(source) / "config.yaml").is_file():
        return RunDir(Path(source))
    if Path(source).exists() or source in list_recipes():
        return None
    try:
        return find_run(source)
    except ConfigError:
        return None  # the loader says what there is


def opened(name: str, verb: str, *flags: str, talks: bool = False) -> tuple[RunDir, Config]:
    """A run and its config, for `sft-dist VERB NAME FLAGS`: goes on inside of its image if it has one."""
    from sft_dist.config.loader import load_run_config
    from sft_dist.jobs.container_probe import enter_image
    from sft_dist.rundir import find_run

    run = find_run(name)
    config = load_run_config(run.config)
    runs = run.path.absolute().parent
    enter_image(config, [verb, str(run.path.absolute()), *flags], runs, talks=talks)
    return run, config


def loaded_here(source: str, overrides: list[str] | None, *flags: str) -> LoadedConfig:
    """A config for `sft-dist train SOURCE OVERRIDES FLAGS`: goes on inside of its image if it has one."""
    from sft_dist.jobs.container_probe import enter_image
    from sft_dist.rundir import runs_root

    loaded = load(source, overrides)
    files = [Path(origin[5:]) for origin in set(loaded.provenance.values()) if origin.startswith("file ")]
    enter_image(loaded.config, ["train", source, *(overrides or []), *flags], runs_root(loaded.config.run.dir), files)
    return loaded


def ready_here(name: str, *, accept: bool) -> RunDir:
    """The run to resume on this machine; with `accept` on changed data too. Raises ConfigError if it is at work or done."""
    from sft_dist.jobs.admission import refuse_live
    from sft_dist.train.resume import accept_change

    run, _ = opened(name, "resume", *["--accept-change"] * accept)
    if run.read_status().get("state") == "done" and (run.model / "DONE").is_file():
        raise ConfigError(f"run {run.name} is done", hint=f"see it with: sft-dist report {name}")
    refuse_live(run)  # before the mark goes: a job that is about to save and end would be requeued
    run.cancelled.unlink(missing_ok=True)
    if accept:
        accept_change(run)
    return run


def ready_again(run: RunDir, overrides: Sequence[str]) -> Config:
    """The config of a run to go on with, `slurm` changed by `overrides`. Raises ConfigError if it is at work or done."""
    from sft_dist.config.loader import write_config
    from sft_dist.files import write_text
    from sft_dist.jobs.admission import refuse_live

    if run.read_status().get("state") == "done" and (run.model / "DONE").is_file():
        raise ConfigError(f"run {run.name} is done", hint=f"see it with: sft-dist report {run.quoted}")
    refuse_live(run)
    config = config_again(run, overrides)
    if overrides:
        write_text(run.config, write_config(config))
    return config


def config_again(run: RunDir, overrides: Sequence[str]) -> Config:
    """The config of a run, `slurm` changed by `overrides`; writes nothing."""
    from sft_dist.config.loader import load_run_config
    from sft_dist.config.resubmit import with_slurm

    return with_slurm(load_run_config(run.config), overrides)


def swept(source: str, overrides: Sequence[str], array: Sequence[str]) -> Iterator[LoadedConfig]:
    """The config of each combination of `KEY=V1,V2` values, named NAME-KEY-VALUE. Raises ConfigError."""
    from sft_dist.config.yaml12 import parse_yaml

    axes: list[list[tuple[str, Any]]] = []
    for word in array:
        key, equals, text = word.partition("=")
        values = parse_yaml(f"[{text}]", "--array") if equals else None
        if not values:
            raise ConfigError(f"--array {word} is not KEY=VALUE,VALUE", hint="--array train.learning_rate=1e-5,2e-5")
        if key.startswith("slurm.") or key in ("run.name", "run.dir"):
            raise ConfigError(f"--array {key}: an array has one slurm section, one folder, and names of its own")
        axes.append([(key, value) for value in values])
    name, slugs = str(load(source, list(overrides)).config.run.name), set[str]()
    for point in itertools.product(*axes):
        words = [f"{key.rpartition('.')[2]}-{value}" for key, value in point]
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([name, *words])).strip("-.")[:120]
        if slug in slugs:
            raise ConfigError(f"--array makes two runs called {slug}", hint="submit one of them by itself")
        slugs.add(slug)
        fields = [f"{key}={json.dumps(value)}" for key, value in point]
        yield load(source, [*overrides, *fields, f"run.name={json.dumps(slug)}"])


def write_reports(names: Sequence[str], *, index: bool, out: Path | None) -> Path:
    """The page that `report` was asked for: of one run, of several beside each other, or of all in the runs' folder."""
    from sft_dist.jobs.records import find_runs
    from sft_dist.report.compare import write_comparison, write_index
    from sft_dist.rundir import find_run, runs_root
    from sft_dist.stages import report_here

    if index and names:
        raise ConfigError("--index lists all runs, and runs were named", hint="leave out either")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder", hint=f"name the file: --out {out / 'report.html'}")
    if index:
        root = runs_root()
        return write_index(find_runs(root), out or root / "index.html", root)
    if not names:
        raise ConfigError("no run was named", hint="sft-dist report RUN, report A B to compare, report --index for all")
    runs = [find_run(name) for name in names]
    if len(runs) == 1:
        if out is not None:
            raise ConfigError("--out is for comparisons and lists", hint="a run's report goes into its folder")
        report_here(runs[0])
        return runs[0].report
    slug = "-".join(run.path.resolve().name for run in runs)[:150]
    return write_comparison(runs, out or runs[0].path.parent / f"compare-{slug}.html")


def show_result(run: RunDir, *, as_json: bool = False) -> None:
    """Scores and samples of a run, and where to look further."""
    from rich.console import Console

    from sft_dist.files import read_json
    from sft_dist.report.tables import result_tables

    if as_json:
        typer.echo(json.dumps(read_json(run.scores) or {}, indent=2))
        return
    for table in result_tables(run):
        Console(highlight=False).print(table)
    if run.report.is_file():
        typer.echo(run.report)
