"""Files that are whole or not there: JSON, JSON Lines and folders, published by rename.

A reader on another host sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
# How often a file is opened that others replace meanwhile.
TRIES = 5


def utc_now() -> str:
    """The current time as ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()


def moment(value: Any) -> datetime.datetime | None:
    """An ISO 8601 time, taken as UTC if it names no zone; None if `value` is no time."""
    try:
        time = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` to `path` by way of a temporary file in the same folder and an atomic rename.

    Without `durable` nothing waits for the disk: if the machine fails, the file may be empty. Half a surrogate pair, which UTF-8 cannot hold, becomes its \\udXXX escape: valid inside JSON.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` to `path` by way of a temporary file in the same folder and an atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError if it could not be written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems sync no folders; a rename in them is safe once the server has answered.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` as indented JSON, as write_text does; non-finite numbers become null, since JSON has none."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", durable=durable)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` as JSON Lines, atomically."""
    lines = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line of JSON in a single write; a torn line that a killed writer left is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("a+b") as stream:
        if stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            line = "\n" + line
        stream.write(line.encode("utf-8", "backslashreplace"))


class PatientJsonl:
    """Appends to a JSON Lines file; rows that cannot be written (the disk is full) wait for the next one's turn.

    For what a long computation says while it goes: no reason to end it. Said once each time that it begins.
    """

    def __init__(self, path: Path, keep: int = 10_000) -> None:
        self.path = path
        self.lost = 0
        """Rows beyond the `keep` that wait: the oldest ones are given up."""
        self._waiting: collections.deque[dict[str, Any]] = collections.deque()
        self._keep = keep
        self._failing = False

    def append(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        self.flush()
        if len(self._waiting) > self._keep:
            self._waiting.popleft()
            self.lost += 1

    def flush(self) -> int:
        """Try once to write what waits; returns how many rows are missing in the file."""
        try:
            while self._waiting:
                append_jsonl(self.path, self._waiting[0])
                self._waiting.popleft()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written (%s); its rows are kept in memory", self.path.name, error.strerror)
            self._failing = True
        return self.lost + len(self._waiting)


def read_json(path: Path) -> Any:
    """The parsed content of `path`, or None if there is no such file."""
    for left in reversed(range(TRIES)):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            # Another host has replaced it since it was opened here: NFS keeps no old file for a reader elsewhere.
            if error.errno != errno.ESTALE or not left:
                raise
    raise AssertionError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if there is none, or only a part of one."""
    with contextlib.suppress(ValueError):
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, [] if it is missing; a line that a killed writer tore is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    ):  # not splitlines: an answer may hold U+2028
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def told_by(output: str) -> dict[str, Any]:
    """The last JSON object that a process printed on a line of its own; {} if it ended before it printed one.

    Libraries and a model's own code print, too.
    """
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


@contextlib.contextmanager
def publish_dir(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it becomes `target` by one rename when the block ends without error.

    If `target` has appeared in the meantime (another process was faster), that one stays and ours is dropped. Its files are
    on the disk before they bear its name, and readable to whom the umask says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as name:
        staged = Path(name) / "staged"
        staged.mkdir()
        yield staged
        for path in (*staged.rglob("*"), staged):
            if path.is_file() and not path.is_symlink():
                open_to_umask(path)
            if not path.is_symlink():
                sync_path(path)
        try:
            staged.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync_path(target.parent)


def open_to_umask(path: Path) -> None:
    """Let a file be read and written by whom the umask says: safetensors 0.8 writes for the owner alone. Raises OSError."""
    mode = path.stat().st_mode & 0o777
    wanted = mode | 0o666 & ~_umask()
    if wanted != mode:
        path.chmod(wanted)


def _umask() -> int:
    # Asked of the kernel: it can only be set for a moment, in which other threads make files that everybody may write.
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], 8)
    current = os.umask(0)
    os.umask(current)
    return current


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
