"""The commands that look before there is a run: `doctor` at the machine, `check` at a config."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer

from sft_dist.cli_data import ConfigArgument, Overrides, load

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what starts torch: GPUs and processes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="This area alone; may be said several times.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Is this machine fit for training; exit status 3 if not. Example: sft-dist doctor"""
    from sft_dist.check.doctor import AREAS, SLOW, examine, facts, lines
    from sft_dist.errors import ConfigError

    if unknown := [area for area in only or () if area not in AREAS]:
        raise ConfigError(f"--only {unknown[0]} is no area", hint=f"areas: {', '.join(AREAS)}")
    areas = [area for area in only or AREAS if not (quick and area in SLOW)]
    found = []
    for finding in examine(areas):
        found.append(finding)
        if not as_json:
            typer.echo(lines(finding))
    if as_json:
        typer.echo(json.dumps(facts(found), indent=2, ensure_ascii=False))
    problems = sum(finding.level == "problem" for finding in found)
    if problems:
        sys.stderr.write(f"{problems} problem{'s' * (problems > 1)}: a run on this machine would fail\n")
        raise typer.Exit(3)


def check(
    config: ConfigArgument,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="As a job of SLURM, and fetch what its nodes need.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Prove that a run of this config will start, without making one. Example: sft-dist check my.yaml --slurm"""
    from sft_dist.check.doctor import facts, lines
    from sft_dist.check.finding import Finding
    from sft_dist.check.proof import preflight
    from sft_dist.errors import SftDistError

    loaded, result = load(config, overrides), sys.stdout
    found: list[Finding] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print while they load is no finding
            for finding in preflight(loaded.config, for_job=slurm):
                found.append(finding)
                if not as_json:
                    typer.echo(lines(finding), file=result)
    except SftDistError as error:
        found.append(Finding("config", "problem", error.message, error.hint))
        raise
    finally:
        if as_json:
            typer.echo(json.dumps(facts(found), indent=2, ensure_ascii=False))
