"""Where rows come from: a JSON or JSONL file, a dataset of the Hub, or a synthetic task."""

from __future__ import annotations

import codecs
import difflib
import io
import itertools
import json
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from sft_dist.config.schema import DataFormat, SourceConfig
from sft_dist.data.formats import Example, detect_format, parse_row
from sft_dist.data.hub import prefer_cache_without_network
from sft_dist.data.mix import mix
from sft_dist.data.tickets import tickets
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import write_text

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
OTHER_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
TASKS = {"tickets": tickets, "mix": mix}
SHOWN_BAD_ROWS = 5

# Where a row stands, and the row; a DataError in the row's place is a line that is not JSON.
Row = tuple[str, Any]


def load_examples(
    source: SourceConfig, *, system: str | None, on_bad_row: Literal["error", "drop"]
) -> tuple[list[Example], list[str]]:
    """The usable rows of `source`, and a message for each row that was dropped.

    Raises DataError if the source cannot be read or holds no usable row, and, with on_bad_row="error", if any row
    cannot be used (the first five are named, the others counted).
    """
    rows = list(itertools.islice(_rows(source), source.sample))
    if not rows:
        raise DataError(
            f"{source.path} holds no rows", hint="one JSON object a line is one row; see `sft-dist data make`"
        )
    data_format = source.format if source.format != "auto" else _format_of(rows)
    examples: list[Example] = []
    bad: list[DataError] = []
    for where, record in rows:
        try:
            if isinstance(record, DataError):
                raise record
            examples.append(parse_row(record, data_format, where, system))
        except DataError as error:
            bad.append(error)
    if bad and (on_bad_row == "error" or not examples):
        raise _bad_rows(bad, total=len(rows), dropped=on_bad_row == "drop")
    return examples, [error.message for error in bad]


def task_rows(task: str, rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a synthetic task, the same for the same seed; ConfigError for an unknown task."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no synthetic task {task!r}{guess}", hint=f"tasks: {', '.join(TASKS)}")
    return TASKS[task](rows, seed)


def write_task(task: str, rows: int, seed: int, path: Path) -> Path:
    """Write a synthetic task as JSONL to `path`, atomically, and return it; an existing file is refused (ConfigError)."""
    if path.exists():
        raise ConfigError(f"{path} already exists and was left as it is", hint="give another file name, or remove it")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in task_rows(task, rows, seed)]
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _rows(source: SourceConfig) -> Iterator[Row]:
    if source.task is not None:
        made = task_rows(source.task, source.rows, source.seed)
        return ((f"task {source.task}, row {number}", row) for number, row in enumerate(made, 1))
    name = source.path or ""
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"{name} is a folder, not a file", hint=_nearby(path / "_"))
    if path.exists():
        return _file_rows(path, name)
    if path.suffix in JSON_SUFFIXES or not HUB_NAME.fullmatch(name):
        raise DataError(f"there is no file {name} (looked in {Path.cwd()})", hint=_nearby(path))
    return _hub_rows(source, name)


def _file_rows(path: Path, name: str) -> Iterator[Row]:
    if path.suffix.lower() in OTHER_SUFFIXES:
        load = f"load_dataset('{OTHER_SUFFIXES[path.suffix.lower()]}', data_files='{name}', split='train')"
        raise DataError(
            f"{name} is not read as it is: files must be JSON or JSONL",
            hint=f"convert it: python -c \"from datasets import *; {load}.to_json('{path.stem}.jsonl')\"",
        )
    try:
        with path.open("rb") as stream:
            head = stream.peek(4096)
            _check_encoding(head, name)
            start = head.removeprefix(codecs.BOM_UTF8).lstrip()
            # Lines of objects may stand in a .json file, and an array in a .jsonl file: the content decides.
            if path.suffix.lower() == ".json" or start.startswith(b"["):
                text = _decode(stream.read(), name)
                yield from _json_rows(text, name)
            else:
                yield from _jsonl_rows(stream, name)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error


def _json_rows(text: str, name: str) -> Iterator[Row]:
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _jsonl_rows(io.BytesIO(text.encode()), name)
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: {_not_json(error)}", hint='a right file: [{"messages": [...]}, ...]') from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(
            f'{name} holds one JSON {"object" if isinstance(value, dict) else "value"} without a list "data"',
            hint='a right file: [{"messages": [...]}, ...] or {"data": [...]}; rows one a line belong in a .jsonl file',
        )
    for number, record in enumerate(value, 1):
        yield f"{name}: row {number}", record


def _jsonl_rows(stream: io.BufferedIOBase, name: str) -> Iterator[Row]:
    # Split at \n in bytes: text mode and splitlines() would also split at characters that may stand inside a string.
    for number, line in enumerate(stream, 1):
        text = _decode(line, f"{name}:{number}").strip()
        if not text:
            continue
        where = f"{name}:{number}"
        try:
            yield where, json.loads(text)
        except (ValueError, RecursionError) as error:
            yield where, DataError(f"{where}: {_not_json(error)}", hint="one whole JSON object a line")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{where} is not UTF-8 text ({byte})", hint=_iconv("LATIN1")) from error


def _check_encoding(head: bytes, name: str) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is UTF-16 text; files must be UTF-8", hint=_iconv("UTF-16"))
    if b"\0" in head:
        raise DataError(f"{name} is binary or UTF-16, not UTF-8 text", hint=_iconv("UTF-16"))


def _iconv(encoding: str) -> str:
    return f"convert it, if it is {encoding}: iconv -f {encoding} -t UTF-8 OLD_FILE > NEW_FILE"


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return f"not valid JSON: {textwrap.shorten(str(error), 80)}"


def _hub_rows(source: SourceConfig, name: str) -> Iterator[Row]:
    prefer_cache_without_network()
    import datasets

    try:
        table = datasets.load_dataset(name, source.name, split=source.split, revision=source.revision)
    except Exception as error:
        # datasets raises a dozen kinds here (no network, gated, unknown name, split or configuration, bad file).
        raise _not_fetched(source, name, error) from error
    if not len(table):
        raise DataError(f"the dataset {name} has no rows in split {source.split}")
    return ((f"{name} ({source.split}), row {number}", dict(row)) for number, row in enumerate(table, 1))


def _not_fetched(source: SourceConfig, name: str, error: Exception) -> DataError:
    tried = f"load_dataset({name!r}, {source.name!r}, split={source.split!r}, revision={source.revision!r})"
    reason = textwrap.shorten(str(error), 300) or "no reason given"
    offline = [key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(key, "0") not in ("", "0")]
    steps = [f"if {name} is a file: {_nearby(Path(name))}"]
    if offline:
        steps.append(f"{offline[0]} is set, so only datasets in the local cache are found; unset it to fetch")
    steps.append("without a network here, fetch it once on a machine that has one (same HF_HOME), or pass a JSONL file")
    return DataError(
        f"{name} is no file in {Path.cwd()}, and the dataset of that name could not be fetched from here\n"
        f"  tried  {tried}\n  got    {type(error).__name__}: {reason}",
        hint="\n  ".join(steps),
    )


def _nearby(path: Path) -> str:
    """What to try instead of a path that is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    data = [name for name in names if name.endswith(JSON_SUFFIXES)]
    return f"JSON files in {folder}: {', '.join(data[:8])}" if data else f"there are no JSON files in {folder}"


def _format_of(rows: Sequence[Row]) -> DataFormat:
    """The format of the first row that has one, so that one bad row in front does not hide what the others are."""
    first: DataError | None = None
    for where, record in rows:
        try:
            if isinstance(record, DataError):
                raise record
            return detect_format(record, where)
        except DataError as error:
            first = first or error
    assert first is not None, "called with rows"
    raise first


def _bad_rows(bad: Sequence[DataError], *, total: int, dropped: bool) -> DataError:
    shown = [error.message for error in bad[:SHOWN_BAD_ROWS]]
    if len(bad) > len(shown):
        shown.append(f"... and {len(bad) - len(shown)} more")
    hints = [bad[0].hint] if bad[0].hint else []
    if not dropped:
        hints.append("to leave out rows like these and count them: data.on_bad_row=drop")
    what = f"all {total} rows were dropped" if dropped else f"{len(bad)} of {total} rows cannot be used"
    if total == 1 and not dropped:
        what = "the only row cannot be used"
    return DataError("\n  ".join([f"{what}:", *shown]), hint="\n  ".join(hints))
