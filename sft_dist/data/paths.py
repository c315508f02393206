"""Which files a data source names: one, those of a folder, or those that a pattern matches."""

from __future__ import annotations

import difflib
import glob
import itertools
import re
from pathlib import Path

from sft_dist.errors import DataError

# What a name's ending says about the content; .gz and .zst around it are unpacked.
KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = (".gz", ".zst")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
# Files that `save_to_disk` of datasets leaves in a folder: both of one split, the last of several.
SAVED, SAVED_SPLITS = ("dataset_info.json", "state.json"), "dataset_dict.json"
# What is said about data, not data. Data folders of other trainers hold a dataset_info.json of their own.
ABOUT = ("dataset_info.json", "dataset_infos.json", SAVED_SPLITS)


def source_files(name: str) -> list[Path] | None:
    """The files behind `name` in order; None if it can only be the name of a dataset on the Hub.

    A folder that datasets saved stands for itself. Raises DataError if there is no such file, naming what is near.
    """
    path = Path(name).expanduser()
    if is_saved(path):
        return [path]
    if path.is_dir():
        return _known(sorted(path.rglob("*")), name, path)
    if path.exists():
        return [path]
    if glob.has_magic(name):
        # What stands before the first sign of a pattern is a folder that was named, hidden or above this one.
        start = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        return _known(sorted(start.glob(str(path.relative_to(start)))), name, start)
    if kind_of(path) or not HUB_NAME.fullmatch(name):
        raise DataError(f"there is no file {name} (looked in {Path.cwd()})", hint=nearby(path))
    return None


def is_saved(path: Path) -> bool:
    """Whether `path` is a folder that `save_to_disk` of datasets made."""
    return all((path / name).is_file() for name in SAVED) or (path / SAVED_SPLITS).is_file()


def kind_of(path: Path) -> str | None:
    """json, jsonl, csv, parquet or arrow by the name's ending; None if it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def nearby(path: Path) -> str:
    """What to try instead of a path that is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    data = [name for name in names if kind_of(Path(name))]
    return f"data files in {folder}: {', '.join(data[:8])}" if data else f"there are no data files in {folder}"


def _about(path: Path) -> bool:
    return path.name in ABOUT or (path.name in SAVED and is_saved(path.parent))


def _known(paths: list[Path], name: str, folder: Path) -> list[Path]:
    """The files among `paths` whose endings are known, none of them hidden or about data only."""
    parts = [(path, path.relative_to(folder).parts) for path in paths]
    visible = [path for path, names in parts if not any(it.startswith(".") and it != ".." for it in names)]
    files = [path for path in visible if path.is_file() and kind_of(path) and not _about(path)]
    if not files:
        raise DataError(
            f"{name} {'matches' if glob.has_magic(name) else 'holds'} no data files",
            hint=f"known endings: {', '.join(KINDS)}, each also with {' or '.join(PACKED)}",
        )
    return files
