"""Checkpoints that count only with their manifest: sizes and hashes of every file, written last."""

from __future__ import annotations

import contextlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from sft_dist.files import read_json, utc_now, write_json
from sft_dist.rundir import RunDir
from sft_dist.train.ranks import Ranks

MANIFEST = "MANIFEST.json"
PIECE = 16 * 2**20
# What a manifest says of how its checkpoint was trained, as far as the run that goes on asks.
OF_PLAN = ("plan", "dtype", "use_cpu", "world_size", "per_device_train_batch_size", "gradient_checkpointing")


def write_manifest(checkpoint: Path, step: int, facts: dict[str, Any], ranks: Ranks | None = None) -> None:
    """Record every file of `checkpoint` with size and hash (XXH3, 128 bits); from here on the checkpoint is complete.

    Every process calls it once it has written its own files; each of them hashes a share of all files.
    """
    ranks = ranks or Ranks()
    ranks.barrier()
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    mine = files[ranks.rank :: ranks.size]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_digest, mine))
    entries = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(mine, digests, strict=True)
    }
    shares = ranks.everyones(entries)
    if ranks.is_main:
        together = {name: entry for share in shares for name, entry in share.items()}
        found = {"step": step, "written": utc_now(), **facts, "files": dict(sorted(together.items()))}
        write_json(checkpoint / MANIFEST, found)
    ranks.barrier()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there with its size and hash."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except ValueError:
        return f"{MANIFEST} is not readable"
    if manifest is None:
        return f"{MANIFEST} is missing: the save did not finish"
    try:
        return _first_difference(checkpoint, manifest["files"])
    except (KeyError, TypeError, AttributeError):  # JSON, but not a manifest
        return f"{MANIFEST} is not readable"


def _first_difference(checkpoint: Path, files: dict[str, Any]) -> str | None:
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    for name, entry in files.items():
        if _digest(checkpoint / name) != entry["xxh3_128"]:
            return f"{name} has changed since it was written"
    return None


def list_checkpoints(run: RunDir) -> list[tuple[int, Path]]:
    """(step, folder) of everything named checkpoint-N, newest first, complete or not."""
    found = []
    if run.checkpoints.is_dir():
        for path in run.checkpoints.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_complete(run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each damaged one, which is renamed `torn-checkpoint-N`."""
    torn: list[str] = []
    for _, path in list_checkpoints(run):
        problem = damage(path)
        if problem is None:
            return path, torn
        aside = path.with_name(f"torn-{path.name}")
        while aside.exists():  # set aside before, saved again and torn again
            aside = aside.with_name(f"{aside.name}-again")
        path.rename(aside)
        torn.append(f"{path.name}: {problem}; set aside as {aside.name}")
    return None, torn


def newest_facts(run: RunDir) -> dict[str, Any] | None:
    """What the newest checkpoint that has a manifest says of how it was trained; None without one. Hashes nothing."""
    for _, path in list_checkpoints(run):
        with contextlib.suppress(ValueError):
            manifest = read_json(path / MANIFEST)
            if isinstance(manifest, dict) and manifest.keys() >= {*OF_PLAN}:
                return manifest
    return None


def rotate(run: RunDir, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep` complete ones; called once a newer one is complete."""
    complete = [path for _, path in list_checkpoints(run) if (path / MANIFEST).is_file()]
    for path in complete[keep:]:
        shutil.rmtree(path)


def _digest(path: Path) -> str:
    # Not a cryptographic hash: it must tell torn and rotten files, at the speed at which they are read. SHA-256 took
    # 13 of the 15 s in which a GPU machine saved 8 GB twice.
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
