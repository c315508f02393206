"""Is this machine fit: what a run would stumble over is looked at before there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from sft_dist.check.finding import Finding
from sft_dist.check.gpus import look_at_gpus
from sft_dist.check.host import look_at_compiler, look_at_folders, look_at_host
from sft_dist.check.packages import look_at_packages
from sft_dist.check.processes import look_at_processes
from sft_dist.check.surroundings import look_at_network, look_at_runtimes, look_at_slurm
from sft_dist.parallel.machine import this_machine

AREAS = ("packages", "host", "folders", "compiler", "processes", "GPUs", "network", "SLURM", "containers")
SLOW = ("processes", "GPUs")


def examine(only: Sequence[str] = AREAS) -> Iterator[Finding]:
    """Every finding of these areas, as it comes, in the order of AREAS."""
    machine = this_machine()
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "packages": look_at_packages,
        "host": lambda: look_at_host(machine),
        "folders": look_at_folders,
        "compiler": lambda: look_at_compiler(machine),
        # Before this process takes the GPUs: some sites let only one at a time have them.
        "processes": lambda: [look_at_processes(machine)],
        "GPUs": lambda: look_at_gpus(machine),
        "network": lambda: [look_at_network()],
        "SLURM": lambda: [look_at_slurm()],
        "containers": look_at_runtimes,
    }
    for area in AREAS:
        if area in only:
            yield from _safe(area, looks[area])


def _safe(area: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `look` finds; that it fails is a finding, and no reason not to look at the rest."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(area, "problem", f"{type(error).__name__}: {error}".splitlines()[0])


def facts(findings: Iterable[Finding]) -> list[dict[str, str | None]]:
    """The findings for `--json`."""
    return [asdict(finding) for finding in findings]


def lines(finding: Finding) -> str:
    """A finding for a terminal: a mark, the area and what was found; what to do stands below it."""
    mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.level]
    text = f"{mark}  {finding.area + ':':12} {finding.said}"
    return text if finding.fix is None or finding.level == "ok" else f"{text}\n{'':22}{finding.fix}"
