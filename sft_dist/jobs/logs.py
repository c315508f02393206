"""The log files of a run as one stream of lines, each with the node or rank that it came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sft_dist.files import read_json
from sft_dist.jobs.records import Submitted, submitted_jobs
from sft_dist.rundir import RunDir

# A line is cut here: a log may hold binary data, or a progress bar's whole life between two newlines.
MAX_LINE = 4000
BLOCK = 1 << 16
# From each file a turn, so that none starves the others.
MAX_TURN = 1 << 22
# After as many looks without news, a line that has no end yet is shown: it may be a question, or a crash's last word.
PATIENCE = 3

# ESC sequences: CSI (colours, cursor), OSC and the like (titles, links) up to their end, and those of two characters.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_]?)")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Source:
    """One log file."""

    path: Path
    label: str
    """n0 for the first node of a job, r0 for a rank, else the file's name."""
    number: int | None
    """Of the node or rank."""


@dataclass
class _Reader:
    """Where reading one file has come to."""

    offset: int = 0
    file: int = 0
    """Its inode: another file of this name is read from its beginning."""
    pending: bytearray = field(default_factory=bytearray)
    dropped: int = 0
    returned: bool = False
    """The last byte was a carriage return: what comes next overwrites the line, unless it is a newline."""
    quiet: int = 0


def sources(run: RunDir, rank: int | None = None) -> list[Source]:
    """The run's log files, those last written to at the end; with `rank` only those of that node or rank."""
    paths = [*run.logs.glob("*.log"), *(run.path / "slurm").glob("**/*_log.out")]
    paths += (run.path / "slurm").glob("**/*_log.err")
    for job in _submitted(run):
        if job.folder is not None:
            paths += [path for path in job.folder.glob(f"{job.id}_*_log.*") if _is_log_of(job, path)]
    dated = []
    for path in {path.absolute(): path for path in paths}.values():
        try:
            dated.append((path.stat().st_mtime_ns, str(path), path))
        except OSError:  # taken away meanwhile
            continue
    found = [_source(path) for _, _, path in sorted(dated)]
    return [source for source in found if rank is None or source.number == rank]


def _submitted(run: RunDir) -> tuple[Submitted, ...]:
    try:
        return submitted_jobs(read_json(run.path / "slurm" / "job.json"))
    except (OSError, ValueError, RecursionError):  # its files in the run's folder are found without it
        return ()


def _is_log_of(job: Submitted, path: Path) -> bool:
    return re.fullmatch(rf"{job.id}_\d{{1,6}}_log\.(out|err)", path.name, re.ASCII) is not None


def _source(path: Path) -> Source:
    # submitit's %j_%t_log.out: the job, the task (one a node); in an array %A_%a_%t_log.out.
    if task := re.fullmatch(r"\d+(?:_\d+)?_(\d{1,6})_log\.(?:out|err)", path.name, re.ASCII):
        return Source(path, f"n{int(task[1])}", int(task[1]))
    if rank := re.fullmatch(r"(rank|node|worker)[-_]?(\d{1,6})\.log", path.name, re.ASCII):
        return Source(path, f"{'n' if rank[1] == 'node' else 'r'}{int(rank[2])}", int(rank[2]))
    return Source(path, harmless(path.name.rsplit(".", 1)[0])[:20], None)


class Follower:
    """Reads what is new in a run's log files at every call of `news`; works where only polling sees changes (NFS)."""

    def __init__(self, run: RunDir, *, rank: int | None = None, tail: int | None = None) -> None:
        self.run, self.rank = run, rank
        self._readers: dict[Path, _Reader] = {}
        if tail is not None:
            self._skip_all_but(tail)

    def news(self) -> Iterator[tuple[str, str]]:
        """Each complete line since the last call, with its label; files that have appeared are read from their start."""
        for source in sources(self.run, self.rank):
            reader = self._readers.setdefault(source.path, _Reader())
            for line in _new_lines(source.path, reader):
                yield source.label, line

    def rest(self) -> Iterator[tuple[str, str]]:
        """The lines that never got an end, once nothing more will come."""
        for source in sources(self.run, self.rank):
            reader = self._readers.get(source.path)
            if reader is not None and (reader.pending or reader.dropped):
                yield source.label, _taken(reader)

    def _skip_all_but(self, tail: int) -> None:
        """Start so that of each node's or rank's stream only the last `tail` lines are read, over all of its jobs."""
        left: dict[tuple[str, str], int] = {}
        for source in reversed(sources(self.run, self.rank)):
            stream = (source.label, source.path.suffix)
            lines, offset, file = _last_lines(source.path, left.get(stream, tail))
            left[stream] = left.get(stream, tail) - lines
            self._readers[source.path] = _Reader(offset=offset, file=file)


def harmless(text: str) -> str:
    """`text` without a terminal's escape sequences, and with every other control character written out as <U+0007>."""
    return _CONTROLS.sub(lambda found: f"<U+{ord(found[0]):04X}>", _ESCAPES.sub("", text))


def _new_lines(path: Path, reader: _Reader) -> Iterator[str]:
    """The lines that `path` has gained. Opened anew each time: that is when NFS asks the server what is new."""
    read = 0
    try:
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            if reader.file != facts.st_ino or facts.st_size < reader.offset:
                reader.offset, reader.file, reader.dropped = 0, facts.st_ino, 0
                reader.pending.clear()
            stream.seek(reader.offset)
            while read < MAX_TURN and (block := stream.read(BLOCK)):
                read += len(block)
                reader.offset += len(block)
                yield from _split(reader, block)
    except OSError:  # not ours to read, or gone
        return
    reader.quiet = 0 if read else reader.quiet + 1
    if reader.quiet == PATIENCE and reader.pending:
        yield _taken(reader)


def _split(reader: _Reader, block: bytes) -> Iterator[str]:
    *ended, last = block.split(b"\n")
    for piece in ended:
        _add(reader, piece)
        yield _taken(reader)
    _add(reader, last)


def _add(reader: _Reader, piece: bytes) -> None:
    """Keep the beginning of a long line; of a progress bar, which returns to its start, the last state."""
    text = piece.rstrip(b"\r")
    _, returned, after = text.rpartition(b"\r")
    if text and (returned or reader.returned):
        reader.pending.clear()
        reader.dropped = 0
    if piece:
        reader.returned = len(text) < len(piece)
    room = max(0, MAX_LINE - len(reader.pending))
    reader.pending += after[:room]
    reader.dropped += max(0, len(after) - room)


def _taken(reader: _Reader) -> str:
    text = harmless(reader.pending.decode("utf-8", "replace"))
    cut = f" ... ({reader.dropped:,} more bytes)" if reader.dropped else ""
    reader.pending.clear()
    reader.dropped, reader.returned = 0, False
    return text + cut


def _last_lines(path: Path, count: int) -> tuple[int, int, int]:
    """How many of the last `count` lines the file has, where they begin, and the file's inode."""
    try:
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            position, seen = facts.st_size, 0
            if count <= 0:
                return 0, position, facts.st_ino
            stream.seek(max(0, position - 1))
            seen = 0 if stream.read(1) in (b"\n", b"") else 1  # a line without an end is a line
            while position > 0:
                start = max(0, position - BLOCK)
                stream.seek(start)
                block = stream.read(position - start)
                place = len(block)
                while (place := block.rfind(b"\n", 0, place)) >= 0:
                    if seen == count:
                        return count, start + place + 1, facts.st_ino
                    seen += 1
                position = start
            return seen, 0, facts.st_ino
    except OSError:
        return 0, 0, 0
