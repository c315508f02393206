"""The run directory: the contract between the processes of a run and every later command.

runs/NAME/
  config.yaml  provenance.json  env.json     what was asked for, where each value came from, where it ran
  plan/accelerate.yaml  plan/deepspeed.json  the plan's settings, as accelerate and DeepSpeed read them
  plan/deepspeed_given.json                  the DeepSpeed file of `accelerate launch`, which stands over the plan's settings
  plan/predicted.json, measured.json         what the planner said of GPU memory and time, and what it was; pace.json: seconds
  status.json  attempts.jsonl                state: queued|running|stopped|failed|done, step, reason; one line an attempt
  metrics.jsonl  data/ledger.json            one line a log event; rows and tokens in, dropped and why
  checkpoints/checkpoint-N/                  as Trainer writes them, plus MANIFEST.json, written last (docs/checkpoints.md)
  eval/held_out.jsonl                        the rows that both models are scored on: before.jsonl, after.jsonl, scores.json
  model/                                     final weights, tokenizer, model card, PROOF.json, DONE
  model/adapter/                             of a LoRA run: the adapter, for peft; alone if model.lora.merge is false
  report.html  loss.png  logs/               logs/failed/ATTEMPT-*.json: what each process that failed left
  slurm/job.json                             the jobs that were submitted for it
  .lock                                      the process that works on it; empty of meaning when nobody holds it
  .cancelled                                 `cancel` was called: nothing requeues it until `resume` or `submit`
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sft_dist.errors import ConfigError
from sft_dist.files import read_object, utc_now, write_json

STATES = ("queued", "running", "stopped", "failed", "done")


@dataclass(frozen=True)
class RunDir:
    """A run's folder, by name of its parts. Creating the object touches nothing."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def quoted(self) -> str:
        """The path as one word of a shell, for commands to type."""
        return shlex.quote(str(self.path))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "data" / "ledger.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def held_out(self) -> Path:
        return self.path / "eval" / "held_out.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def plan(self) -> Path:
        return self.path / "plan"

    @property
    def deepspeed_given(self) -> Path:
        return self.path / "plan" / "deepspeed_given.json"

    @property
    def predicted(self) -> Path:
        return self.path / "plan" / "predicted.json"

    @property
    def measured(self) -> Path:
        return self.path / "plan" / "measured.json"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def cancelled(self) -> Path:
        """There while the run is not to be requeued; whoever starts it again takes it away."""
        return self.path / ".cancelled"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; ConfigError if another one holds it. The lock ends with its process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.open("a+", encoding="utf-8") as stream:
            try:
                _take(stream)
            except BlockingIOError:
                stream.seek(0)
                raise ConfigError(
                    f"run {self.name} is being worked on by another process ({stream.read().strip() or 'unknown'})",
                    hint="wait for it, stop it, or choose another run.name",
                ) from None
            except OSError:  # a filesystem without locks: nothing to hold on to
                yield
                return
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
            yield

    def held(self) -> bool:
        """Whether a process that can be seen from this host works on the run; no answer where there are no locks."""
        try:
            with self.lock.open(encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such file, not ours to read, a filesystem without locks
            return False
        return False

    def read_status(self) -> dict[str, Any]:
        """The content of status.json; {} before the first write, and where a machine failed before it was on the disk."""
        return read_object(self.status)

    def write_status(self, *, durable: bool = True, **fields: Any) -> None:
        """Merge `fields` into status.json and stamp the time; without `durable` nothing waits for the disk."""
        if fields.get("state", "running") not in STATES:
            raise ValueError(f"state {fields['state']!r} is not one of {', '.join(STATES)}")
        write_json(self.status, {**self.read_status(), **fields, "updated": utc_now()}, durable=durable)


def _take(stream: TextIO) -> None:
    """Lock `stream` for this process; tried for a moment, since `held` takes the lock for an instant to see if it is free."""
    for _ in range(15):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.03)
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def runs_root(configured: str | None = None) -> Path:
    """The folder that holds runs: `run.dir`, else $SFT_DIST_RUNS, else ./runs."""
    return Path(configured or os.environ.get("SFT_DIST_RUNS") or "runs").expanduser()


def cache_root() -> Path:
    """The folder of everything that can be made again: $SFT_DIST_CACHE, else ~/.cache/sft-dist."""
    return Path(os.environ.get("SFT_DIST_CACHE") or Path.home() / ".cache" / "sft-dist").expanduser()


def refuse_existing(root: Path, name: str) -> None:
    """Raise ConfigError, with the choices that there are, if `root/name` already holds anything."""
    check_run_name(name)
    run = RunDir(root / name)
    if not run.path.exists() or (run.path.is_dir() and not any(run.path.iterdir())):
        return
    if not run.config.is_file():
        what = f"{run.path} exists and is not a run of sft-dist (it has no config.yaml)"
        raise ConfigError(what, hint="add run.name=ANOTHER_NAME, or move it away")
    choices = ["keep both      add run.name=ANOTHER_NAME", "replace it     add --overwrite (the old run is deleted)"]
    if (state := run.read_status().get("state", "unknown")) != "done":
        command = "submit" if (run.plan / "job.sbatch").is_file() else "resume"
        choices.insert(0, f"go on with it  sft-dist {command} {run.quoted}")
    what = f"the run directory {run.path} already exists (state: {state}) and is never overwritten by accident"
    raise ConfigError(what, problems=choices)


def create_run(root: Path, name: str, *, overwrite: bool = False) -> RunDir:
    """Make `root/name` and return it; a folder that already holds a run is refused, or replaced if `overwrite`."""
    run = RunDir(root / name)
    if overwrite and run.config.is_file():
        with run.locked():
            shutil.rmtree(run.path)
    refuse_existing(root, name)
    run.path.mkdir(parents=True, exist_ok=True)
    return run


def find_run(name_or_path: str) -> RunDir:
    """The run with this name under the runs root, or at this path. ConfigError that lists the runs there are if none is."""
    for candidate in (Path(name_or_path).expanduser(), runs_root() / name_or_path):
        if RunDir(candidate).config.is_file():
            return RunDir(candidate)
    root = runs_root()
    known = sorted(p.parent.name for p in root.glob("*/config.yaml")) if root.is_dir() else []
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    listed = f"runs in {root}: {', '.join(known[:12])}{more}" if known else f"there are no runs in {root}"
    raise ConfigError(f"no run named {name_or_path!r}, and no run directory at that path", hint=listed)


def check_run_name(name: str) -> None:
    """Raise ConfigError unless `name` is one plain folder name that every shell and filesystem takes."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", name):
        hint = "use letters, digits, '.', '_' and '-', starting with a letter or digit, at most 120 characters"
        raise ConfigError(f"run.name {name!r} cannot be a folder name", hint=hint)
