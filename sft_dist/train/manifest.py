"""The manifest of a checkpoint: size and hash of every file, written last and compared before a resume. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from sft_dist.files import open_to_umask, read_json, sync_path, utc_now, write_json
from sft_dist.train.ranks import Ranks

MANIFEST = "MANIFEST.json"
PIECE = 16 * 2**20
# Threads of a process that verifies, and of one that finishes a save while it trains on.
READERS, BESIDE = 8, 2
# What reading a file raises where the file itself is to blame. Anything else (no permission, a file server that is away, too
# many open files) says nothing of what is in it, and may be over tomorrow.
OF_THE_FILE = (errno.EIO, errno.ENOENT, errno.ENOTDIR)

Entries = dict[str, dict[str, Any]]


class Share(NamedTuple):
    """What a process has hashed."""

    entries: Entries
    names: tuple[str, ...]
    """All files that it sees, in order."""


def write_manifest(checkpoint: Path, step: int, facts: dict[str, Any], ranks: Ranks | None = None) -> None:
    """Record every file of `checkpoint` with size and hash (XXH3, 128 bits); from here on the checkpoint is complete.

    Every process calls it once it has written its own files; each of them hashes a share of all files. They are on the
    disk before the manifest is.
    """
    ranks = ranks or Ranks()
    ranks.barrier()
    shares = gathered(checkpoint, settled(checkpoint, ranks), ranks)
    if ranks.is_main:
        seal(checkpoint, step, facts, shares)
    ranks.barrier()


def settled(checkpoint: Path, ranks: Ranks, node_share: tuple[int, int] = (0, 1)) -> Share:
    """Size and hash of this process's share of the files, once what this node wrote is on the disk. Raises OSError.

    Only the host that wrote a file can force it out: the processes of a node, of which this one is `node_share`
    (number, how many), sync all files and folders between them.
    """
    files, folders = _listed(checkpoint)
    with ThreadPoolExecutor(BESIDE) as pool:
        list(pool.map(sync_path, [*files, *folders][node_share[0] :: node_share[1]]))
        entries = _entries(checkpoint, files[ranks.rank :: ranks.size], pool)
    return Share(entries, tuple(str(path.relative_to(checkpoint)) for path in files))


def gathered(checkpoint: Path, mine: Share, ranks: Ranks) -> list[Entries]:
    """What all processes have hashed, and what fell between their shares. All raise OSError if one of them does.

    A shared file system may not yet show a host what another one wrote (the attribute cache of NFS). Then the lists of which
    they took shares differ, and a file may be nobody's; but the host that wrote it sees it.
    """
    told = (mine.entries, xxhash.xxh3_128_hexdigest(repr(mine.names).encode()))
    shares, lists = zip(*ranks.everyones(told), strict=True)
    if len({*lists}) == 1:
        return [*shares]
    sees = {name: rank for rank, names in enumerate(ranks.everyones(mine.names)) for name in names}
    missed = [name for name in mine.names if sees[name] == ranks.rank and not any(name in it for it in shares)]
    entries, failed = dict[str, dict[str, Any]](), None
    try:
        with ThreadPoolExecutor(BESIDE) as pool:
            list(pool.map(sync_path, [checkpoint / name for name in mine.names]))  # shared out by the list as well
            entries = _entries(checkpoint, [checkpoint / name for name in missed], pool)
    except OSError as error:  # the others wait for this one
        failed = f"{error.strerror or error} ({error.filename})"
    more = ranks.everyones((entries, failed))
    if said := next((said for _, said in more if said), None):
        raise OSError(f"a file that not every host sees: {said}")
    return [*shares, *(entries for entries, _ in more)]


def _listed(checkpoint: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders of a checkpoint, as this host sees them now."""
    found = sorted(checkpoint.rglob("*"))
    files = [path for path in found if path.is_file() and path.name != MANIFEST]
    return files, [checkpoint, *(path for path in found if path.is_dir())]


def _entries(checkpoint: Path, files: Sequence[Path], pool: ThreadPoolExecutor) -> Entries:
    return {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(files, pool.map(_digest, files), strict=True)
    }


def seal(checkpoint: Path, step: int, facts: dict[str, Any], shares: Iterable[Entries]) -> dict[str, Any]:
    """Write the manifest of a checkpoint whose files are on the disk, and return it. Raises OSError."""
    sync_path(checkpoint.parent)
    for path in checkpoint.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # a file system without modes
            open_to_umask(path)
    together = {name: entry for share in shares for name, entry in share.items()}
    found = {"step": step, "written": utc_now(), **facts, "files": dict(sorted(together.items()))}
    write_json(checkpoint / MANIFEST, found)
    sync_path(checkpoint)
    return found


def damage(checkpoint: Path, ranks: Ranks | None = None) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there with its size and hash.

    With `ranks` every process must call it: each reads a share of the files, and all learn the answer. Raises OSError, on all
    of them, where a file is kept from us: a checkpoint that nobody could look at is not damaged.
    """
    ranks = ranks or Ranks()
    found = ranks.everyones(_damage(checkpoint, ranks))
    kept = next((it for it in found if isinstance(it, OSError)), None)
    if kept is not None:
        raise kept
    return next((it for it in found if isinstance(it, str)), None)


def _damage(checkpoint: Path, ranks: Ranks) -> str | OSError | None:
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except ValueError:
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return _unread(MANIFEST, error)
    if manifest is None:
        return f"{MANIFEST} is missing: the save did not finish"
    try:
        return _first_difference(checkpoint, manifest["files"], ranks)
    except (KeyError, TypeError, AttributeError, ValueError):  # JSON, but not a manifest
        return f"{MANIFEST} is not readable"


def _unread(name: str, error: OSError) -> str | OSError:
    """What is wrong with the file, or the error where that is not known."""
    return f"{name} cannot be read: {error.strerror or error}" if error.errno in OF_THE_FILE else error


def _first_difference(checkpoint: Path, files: Entries, ranks: Ranks) -> str | OSError | None:
    mine = [name for name, _ in sorted(files.items())][ranks.rank :: ranks.size]
    for name in mine:
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
        except OSError as error:
            return _unread(name, error)
        if size != files[name]["bytes"]:
            return f"{name} has {size} bytes, not {files[name]['bytes']}"

    def differs(name: str) -> str | OSError | None:
        try:
            same = _digest(checkpoint / name) == files[name]["xxh3_128"]
        except OSError as error:
            return _unread(name, error)
        return None if same else f"{name} has changed since it was written"

    with ThreadPoolExecutor(READERS) as pool:
        return next((it for it in pool.map(differs, mine) if it is not None), None)


def size_of(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes and number of the files that a manifest lists."""
    entries = manifest["files"].values()
    return sum(int(entry["bytes"]) for entry in entries), len(entries)


def _digest(path: Path) -> str:
    # Not a cryptographic hash: it must tell torn and rotten files, at the speed at which they are read. SHA-256 took
    # 13 of the 15 s in which a GPU machine saved 8 GB twice.
    digest = xxhash.xxh3_128()
    # One piece of memory for the whole file, not one for each read.
    piece = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()
