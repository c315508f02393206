"""What `sft-dist verify` says of a run's checkpoints: each of them read whole, nothing changed. Imports no torch."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sft_dist.errors import CheckpointError
from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import SET_ASIDE, list_checkpoints
from sft_dist.train.manifest import MANIFEST, damage, size_of

STATES = Literal["complete", "unfinished", "damaged", "set aside"]


@dataclass(frozen=True)
class Found:
    """One checkpoint."""

    name: str
    state: STATES
    step: int
    problem: str | None = None
    """What is wrong, beginning with the file's name."""
    files: int | None = None
    bytes: int | None = None

    def line(self) -> str:
        """For the terminal."""
        if self.files is None or self.bytes is None:
            return f"{self.name}: {self.state}: {self.problem}"
        size = f"{self.bytes / 2**30:.3g} GiB" if self.bytes >= 2**30 else f"{self.bytes / 2**20:.3g} MiB"
        return f"{self.name}: {self.state}, {self.files} files, {size}"


@dataclass(frozen=True)
class Survey:
    """All checkpoints of a run, newest first, those that were set aside last."""

    run: str
    found: tuple[Found, ...]

    @property
    def resumes_from(self) -> str | None:
        """The checkpoint that `resume` takes, as far as the files say; None if it would begin anew."""
        return next((it.name for it in self.found if it.state == "complete"), None)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        found = [asdict(it) for it in self.found]
        return {"run": self.run, "checkpoints": found, "resumes_from": self.resumes_from}

    def lines(self, *, over: bool) -> list[str]:
        """For the terminal; `over` once there is a final model, and nothing to resume."""
        if over:
            return [it.line() for it in self.found] or ["no checkpoints"]
        goes_on = f"resume takes {self.resumes_from}" if self.resumes_from else "resume begins at step 0"
        return [*(it.line() for it in self.found), goes_on if self.found else f"no checkpoints; {goes_on}"]

    def refuse_damage(self) -> None:
        """CheckpointError (exit 5) that names the checkpoints and files that are damaged, if any is."""
        bad = [f"{it.name}: {it.problem}" for it in self.found if it.state == "damaged"]
        if bad:
            takes = (
                f"resume sets newer ones aside and takes {self.resumes_from}" if self.resumes_from else "none is left"
            )
            raise CheckpointError(f"damaged in run {self.run}: {'; '.join(bad)}", hint=takes)


def survey(run: RunDir) -> Survey:
    """Read every checkpoint of `run` and compare sizes and hashes with its manifest."""
    at_work = run.held()
    found = []
    for place, (step, path) in enumerate(list_checkpoints(run)):
        problem = damage(path)
        if problem is None:
            total, files = size_of(read_json(path / MANIFEST))
            found.append(Found(path.name, "complete", step, files=files, bytes=total))
        elif place == 0 and at_work and not (path / MANIFEST).is_file():
            found.append(Found(path.name, "unfinished", step, "the run is at work and has not finished this save"))
        elif path.is_dir():  # else rotation has removed it meanwhile
            found.append(Found(path.name, "damaged", step, problem))
    for path in sorted(run.checkpoints.glob("torn-checkpoint-*")):
        reason = "no reason is on record"
        with contextlib.suppress(OSError):
            reason = (path / SET_ASIDE).read_text(encoding="utf-8").strip()
        number = path.name.removeprefix("torn-checkpoint-").partition("-")[0]
        found.append(Found(path.name, "set aside", int(number) if number.isdigit() else 0, reason))
    return Survey(run.name, tuple(found))
