"""What the disk of a run has room for, asked before anything is written, and what it refused. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, DiskError, PreflightError, WorkersFailed
from sft_dist.parallel.architecture import find_architecture
from sft_dist.parallel.resolve import Resolved
from sft_dist.parallel.storage import checkpoint_bytes
from sft_dist.parallel.weights import weights_of
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import discard, newest_facts
from sft_dist.train.manifest import size_of
from sft_dist.train.ranks import MainFailed, Ranks

log = logging.getLogger(__name__)
# What a checkpoint may be larger than foreseen: the log in trainer_state.json grows, names and headers are not counted.
MARGIN, MARGIN_BYTES = 1.01, 2**20
# Files and folders of a checkpoint beside those that each process writes, and of each process.
FILES, FILES_EACH = 16, 6
QUOTA_TIMEOUT_S = 5.0
# What torch's and safetensors' writers say where they have no errno to give.
WRITERS = re.compile(r"PytorchStreamWriter|iostream error|inline_container|os error \d+|\[Errno \d+\]|write\(\): fd")
NOT_OF_DISKS = (errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT)


@dataclass(frozen=True)
class Need:
    """What one checkpoint takes on the disk."""

    bytes: int
    files: int
    source: str
    """Where the figure comes from, in words."""

    @staticmethod
    def after(last: Mapping[str, Any]) -> Need:
        """What the next one takes, by the manifest of the last one."""
        total, files = size_of(last)
        return Need(round(total * MARGIN) + MARGIN_BYTES, files + FILES, "as the last one")


@dataclass(frozen=True)
class Free:
    """What is left; None where nothing limits or tells it."""

    bytes: int | None
    files: int | None
    where: str


def expected(run: RunDir, config: Config, resolved: Resolved) -> Need | None:
    """What the next checkpoint will take: as the last one of this plan, else what the planner says; None if it cannot."""
    last = newest_facts(run)
    if last is not None and all(last.get(it) == resolved.facts()[it] for it in ("plan", "world_size", "dtype")):
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            return Need.after(last)
    try:
        architecture, _ = find_architecture(config.model)
    except (PreflightError, ConfigError):
        return None
    weights = weights_of(architecture, config.model.lora, resolved.dtype)
    total = round(checkpoint_bytes(weights, resolved.layout) * MARGIN) + MARGIN_BYTES
    return Need(total, FILES + FILES_EACH * resolved.layout.world_size, "by the planner")


def shortage(folder: Path, need: Need, *, quotas: bool = True) -> str | None:
    """Why `need` does not fit into the file system of `folder`, in words; None if it does. Raises OSError.

    Without `quotas` the user's quota is not asked for, which starts a command.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    for free in (_of_disk(folder), *(_of_quotas(folder) if quotas else ())):
        if free.bytes is not None and free.bytes < need.bytes:
            return f"takes {_size(need.bytes)} {need.source}, but {free.where} has {_size(free.bytes)} left"
        if free.files is not None and free.files < need.files:
            return f"takes {need.files} files and folders, but {free.where} has room for {free.files} more"
    return None


def look_for_room(run: RunDir, resolved: Resolved, ranks: Ranks) -> Need | None:
    """What the next checkpoint takes, once it is known to fit: DiskError if not, on every process; all must call it.

    If none is saved but by a stop, a warning says so instead.
    """
    need = ranks.by_main(lambda: expected(run, resolved.config, resolved))
    why = None if need is None else shortage(run.checkpoints, need, quotas=ranks.is_main)
    if resolved.config.checkpoint.save_strategy != "no":
        agree_on_room(run, "a checkpoint", why, ranks)
    elif why is not None:
        log.warning("a checkpoint, which a stop would save, %s", why)
    return need


def agree_on_room(run: RunDir, what: str, why: str | None, ranks: Ranks) -> None:
    """DiskError on every process if one host has no room for `what`: `why`, in its words."""
    told = next((it for it in ranks.everyones(why) if it is not None), None)
    if told is None:
        return
    if not ranks.is_main:
        raise MainFailed("there is no room for a checkpoint")
    aside = sorted(path.name for path in run.checkpoints.glob("torn-checkpoint-*"))
    useless = f" ({', '.join(aside)} in {run.checkpoints} can go)" if aside else ""
    raise DiskError(
        f"{what} {told}",
        hint=f"make room there{useless} and go on with: sft-dist resume {run.quoted}; a new run can lie elsewhere: run.dir=...",
    )


def agree_on_writing(run: RunDir, folder: Path, mine: Exception | None, ranks: Ranks) -> None:
    """Fail on every process if one could not write its part of `folder`; `mine` is what this one met.

    What is half written is removed, which may make room. The processes that met something raise DiskError, or the error
    itself where no disk is to blame; of the others only the main one says what happened.
    """
    told = None if mine is None else f"{type(mine).__name__}: {(str(mine).splitlines() or [''])[0][:300]}"
    try:
        everyones = ranks.everyones(told and (told, socket.gethostname()))
    except Exception:
        if mine is None:
            raise
        raise mine from None  # the others are gone; this is known
    failed = [f"rank {rank} ({it[1]}): {it[0]}" for rank, it in enumerate(everyones) if it is not None]
    if not failed:
        return
    if ranks.is_main:
        with contextlib.suppress(OSError):
            discard(folder)
    said = "; ".join(failed[:4]) if ranks.size > 1 else told
    message = f"{folder.name} could not be written and does not count: {said}"
    hint = f"the checkpoints before it stay; when the disk is in order: sft-dist resume {run.quoted}"
    if mine is not None and not is_of_disk(mine):
        raise mine
    if mine is not None:
        raise DiskError(message, hint=hint) from mine
    if not ranks.is_main:
        raise MainFailed("another process could not write")
    error = WorkersFailed(message, hint=hint)
    error.exit_code = DiskError.exit_code
    raise error


def is_of_disk(error: BaseException) -> bool:
    """Whether a file could not be written, as far as the error says."""
    if isinstance(error, OSError):
        return error.errno not in NOT_OF_DISKS and not isinstance(error, ConnectionError)
    return WRITERS.search(str(error)) is not None


def note_in_engine(engine: Any, noted: Callable[[], contextlib.AbstractContextManager[None]], *, is_main: bool) -> None:
    """Let DeepSpeed's engine come to its barriers whatever a process could not write: `noted` is around it. Once an engine."""
    writer = engine.checkpoint_engine
    if writer.is_decoupled() or "save_checkpoint" in vars(engine):
        return
    plain = engine.save_checkpoint

    def noting(method: Callable[..., Any]) -> Callable[..., None]:
        def part(*args: Any, **kwargs: Any) -> None:
            with noted():
                method(*args, **kwargs)

        return part

    def save_checkpoint(folder: str, exclude_frozen_parameters: bool = False) -> None:
        try:
            plain(folder, save_latest=False, exclude_frozen_parameters=exclude_frozen_parameters)
        except Exception as error:  # the others may be waiting in the engine: this process cannot go on with them
            if is_of_disk(error):
                raise DiskError(f"a checkpoint could not be written: {error}") from error
            raise
        if is_main:
            (Path(folder) / "latest").write_text(f"global_step{engine.global_steps}", encoding="utf-8")

    writer.save, engine._copy_recovery_script = noting(writer.save), noting(engine._copy_recovery_script)
    engine.save_checkpoint = save_checkpoint


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.3g} {name} ({count} bytes)"


def _of_disk(folder: Path) -> Free:
    found = os.statvfs(folder)
    # Some file systems make inodes as they need them, and say that there are none.
    files = found.f_favail if found.f_files else None
    return Free(found.f_bavail * found.f_frsize, files, str(folder))


def _of_quotas(folder: Path) -> Iterator[Free]:
    """What the quotas of user and group leave here, where one of the usual commands answers."""
    commands = (
        ("quota", "-u", "-w", "-f", str(folder)),
        ("quota", "-g", "-w", "-f", str(folder)),
        ("lfs", "quota", "-q", "-u", str(os.getuid()), str(folder)),
        ("lfs", "quota", "-q", "-g", str(os.getgid()), str(folder)),
    )
    for command in commands:
        program = shutil.which(command[0])
        if program is None:
            continue
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(
                [program, *command[1:]], capture_output=True, text=True, timeout=QUOTA_TIMEOUT_S, check=False
            )
            kind = "group" if "-g" in command else "user"
            yield from (Free(*left, f"the {kind}'s quota on {folder}") for left in quota_rows(told.stdout))


def quota_rows(text: str) -> Iterator[tuple[int | None, int | None]]:
    """(bytes, files) that each row of `quota -w` or `lfs quota -q` leaves below the hard limits; None without a limit.

    A row is: name, kilobytes, quota, limit, [grace,] files, quota, limit, [grace]. An asterisk marks what is over quota.
    """
    for line in text.splitlines():
        words = line.split()
        numbers = [int(word.rstrip("*")) for word in words[1:] if re.fullmatch(r"\d+\*?", word)]
        if len(numbers) < 6:
            continue
        used, _, limit, files, _, most = numbers[:6]
        yield (
            max(0, limit - used) * 1024 if limit else None,
            max(0, most - files) if most else None,
        )
