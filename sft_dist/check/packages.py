"""Whether the installed packages are those that sft-dist was tested with."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from sft_dist.check.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "sft-dist"


def look_at_packages() -> Iterator[Finding]:
    """One finding for all that fit, and one for each package that does not.

    Older than the lower bound is a problem, newer than the upper bound a note: nobody has tried it.
    """
    fitting: list[str] = []
    for requirement, optional in wanted():
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if not optional:
                yield Finding(
                    "packages", "problem", f"{requirement.name} is not installed", f"pip install '{requirement}'"
                )
            continue
        found = judge(requirement, installed)
        if found is None:
            fitting.append(f"{requirement.name} {installed}")
        else:
            yield found
    yield Finding("packages", "ok", ", ".join(fitting))


def wanted() -> list[tuple[Requirement, bool]]:
    """The packages that sft-dist names, each once, and whether only an extra needs it. Those for developers are left out."""
    from packaging.requirements import Requirement

    found: dict[str, tuple[Requirement, bool]] = {}
    for line in requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found[requirement.name] = (requirement, False)
        elif not marker.evaluate({"extra": "dev"}):
            requirement.marker = None
            found.setdefault(requirement.name, (requirement, True))
    return list(found.values())


def judge(requirement: Requirement, installed: str) -> Finding | None:
    """What is wrong with this version of a package; None if nothing is."""
    said = f"{requirement.name} is {installed}, and sft-dist was tested with {requirement.specifier}"
    fix = f"pip install '{requirement}'"
    broken = [part.operator for part in requirement.specifier if not part.contains(installed, prereleases=True)]
    if not broken:
        return None
    if all(operator in ("<", "<=") for operator in broken):
        return Finding("packages", "note", said, f"if something fails: {fix}")
    return Finding("packages", "problem", said, fix)
