"""The rows of a source: files, a dataset of the Hub, a synthetic task, or several of these."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import DataFormat, SourceConfig, SourcePart
from sft_dist.config.schema_data import foreign_columns
from sft_dist.data.example import Example, RowFormat
from sft_dist.data.extraction import extraction
from sft_dist.data.formats import detect_format, parse_row
from sft_dist.data.hub import hub_dataset
from sft_dist.data.json_keys import KeyTwice, key_twice
from sft_dist.data.json_rows import NOT_UTF8, Row, read_line
from sft_dist.data.mix import mix
from sft_dist.data.paths import source_files
from sft_dist.data.readers import file_rows
from sft_dist.data.tickets import tickets
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import write_text

TASKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"tickets": tickets, "extraction": extraction, "mix": mix}
# Fields of a source that a task takes beside rows and seed.
OPTIONS = {"tickets": ("language",), "extraction": ("language", "answer"), "mix": ()}
SHOWN_BAD_ROWS = 5
Ints = NDArray[np.int64]
# Rows in which the format is looked for; one that shows none hides no later ones.
LOOKED_AT = 1000


def load_examples(
    source: SourceConfig, *, system: str | None, on_bad_row: Literal["error", "drop"]
) -> tuple[list[Example], list[str]]:
    """The usable rows of `source`, and a message for each row that was dropped.

    Raises DataError if the source cannot be read or holds no usable row, and, with on_bad_row="error", if any row
    cannot be used (the first five are named, the others counted).
    """
    examples: list[Example] = []
    bad: list[DataError] = []
    total = 0
    for part in source.parts:
        how, rows = opened(part, system)
        for row in rows:
            total += 1
            example = read_row(row, how)
            if isinstance(example, DataError):
                bad.append(example)
            else:
                examples.append(example)
    if bad and (on_bad_row == "error" or not examples):
        raise bad_rows(bad, total=total, dropped=on_bad_row == "drop")
    return examples, [error.message for error in bad]


def opened(part: SourcePart, system: str | None) -> tuple[RowFormat, Iterator[Row]]:
    """How the rows of `part` are to be read, and the rows, as often as its weight says.

    Raises DataError if there are none, or if none of them shows which format they have.
    """
    rows = itertools.islice(source_rows(part), part.sample)
    head = list(itertools.islice(rows, 1))
    if not head:
        raise DataError(
            f"{part.path or f'task {part.task}'} holds no rows",
            hint="one JSON object a line is one row; see `sft-dist data make`",
        )
    how = RowFormat.of(part, system)
    if how.name == "auto":
        name, seen = _format_of(itertools.chain(head, rows), part.fields)
        how = RowFormat(name, how.columns, how.roles, system)
        head = seen
    if wrong := foreign_columns(how.columns, how.name):
        raise DataError(
            f"{part.path or part.task}: fields names {wrong}",
            hint="leave it out of fields, or set format to the one that has it",
        )
    weighted = _weighted(itertools.chain(head, rows), part.weight)
    first = list(itertools.islice(weighted, 1))
    if not first:
        raise DataError(
            f"weight {part.weight:g} leaves no row of {part.path or f'task {part.task}'}",
            hint="raise its weight, or take the source out; rows that are few may be all taken: weight 1",
        )
    return how, itertools.chain(first, weighted)


def read_row(row: Row, how: RowFormat) -> Example | DataError:
    """The row as an Example, or what is wrong with it. Raises DataError for a file in another encoding."""
    where = f"{row.origin}{row.number}"
    try:
        record = read_line(where, row.record) if isinstance(row.record, bytes) else row.record
        return record if isinstance(record, DataError) else parse_row(record, how, where, table=row.table)
    except DataError as error:
        if error.reason == NOT_UTF8:
            raise
        return error
    except KeyTwice as error:  # in text of a cell or column that is read as JSON
        return key_twice(where, error)


def source_rows(part: SourcePart) -> Iterator[Row]:
    """Every row of `part`, as it stands there. Raises DataError if it cannot be read."""
    if part.task is not None:
        options = {name: getattr(part, name) for name in OPTIONS[part.task]}
        made = task_rows(part.task, part.rows, part.seed, **options)
        return (Row(f"task {part.task}, row ", number, row) for number, row in enumerate(made, 1))
    name = part.path or ""
    files = source_files(name)
    if files is None:
        return _hub_rows(part, name)
    return itertools.chain.from_iterable(file_rows(path, _called(path, name), part.split) for path in files)


def task_rows(task: str, rows: int, seed: int, **options: str) -> Iterator[dict[str, Any]]:
    """The rows of a synthetic task, the same for the same seed; ConfigError for an unknown task or option."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no synthetic task {task!r}{guess}", hint=f"tasks: {', '.join(TASKS)}")
    foreign = [f"{name} {value}" for name, value in options.items() if name not in OPTIONS[task]]
    if foreign:
        raise ConfigError(f"the task {task} knows no {', '.join(foreign)}", hint="leave it out, or take another task")
    return TASKS[task](rows, seed, **options)


def write_task(task: str, rows: int, seed: int, path: Path, **options: str) -> Path:
    """Write a synthetic task as JSONL to `path`, atomically, and return it; an existing file is refused (ConfigError)."""
    return _write_rows(path, list(task_rows(task, rows, seed, **options)))


def write_splits(task: str, seed: int, folder: Path, sizes: Mapping[str, int], **options: str) -> list[Path]:
    """Write a task's rows to NAME.jsonl in `folder` for each name in `sizes`; no row stands in two of them."""
    paths = {name: folder / f"{name}.jsonl" for name in sizes}
    _refuse_existing(*paths.values())
    rows = task_rows(task, sum(sizes.values()), seed, **options)
    return [_write_rows(paths[name], list(itertools.islice(rows, size))) for name, size in sizes.items()]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    _refuse_existing(path)
    try:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} already exists and was left as it is", hint="give another name, or remove it")


def bad_rows(bad: Sequence[DataError], *, total: int, dropped: bool, count: int | None = None) -> DataError:
    """One error for the `count` rows that cannot be used, of which `bad` holds the first: five by name."""
    count = count or len(bad)
    shown = [error.message for error in bad[:SHOWN_BAD_ROWS]]
    if count > len(shown):
        shown.append(f"... and {count - len(shown)} more")
    hints = [bad[0].hint] if bad[0].hint else []
    if not dropped:
        hints.append("to leave out rows like these and count them: data.on_bad_row=drop")
    what = f"all {total} rows were dropped" if dropped else f"{count} of {total} rows cannot be used"
    if total == 1 and not dropped:
        what = "the only row cannot be used"
    return DataError("\n  ".join([f"{what}:", *shown]), hint="\n  ".join(hints))


def _called(path: Path, name: str) -> str:
    """What messages call a file: as it was typed, if it was."""
    return name if path == Path(name).expanduser() else str(path)


def _weighted(rows: Iterator[Row], weight: float) -> Iterator[Row]:
    """Each row as often as `weight` says, fractions spread evenly: row i is taken floor((i+1)w) - floor(iw) times."""
    if weight == 1.0:
        yield from rows
        return
    for index, row in enumerate(rows):
        yield from itertools.repeat(row, int((index + 1) * weight) - int(index * weight))


def rows_behind(places: Ints, weight: float) -> Ints:
    """Which row of a source each is that `weight` leaves, by its place among these."""
    if weight == 1.0 or not len(places):
        return places
    count = int((int(places.max()) + 2) / weight) + 2
    taken = (np.arange(1, count + 1) * weight).astype(np.int64)  # up to each row, as above
    return np.searchsorted(taken, places, side="right")


def _hub_rows(part: SourcePart, name: str) -> Iterator[Row]:
    table = hub_dataset(part)
    if not len(table):
        raise DataError(f"the dataset {name} has no rows in split {part.split}")
    return (Row(f"{name} ({part.split}), row ", number, dict(row), table=True) for number, row in enumerate(table, 1))


def _format_of(rows: Iterator[Row], columns: dict[str, str]) -> tuple[DataFormat, list[Row]]:
    """The format of the first row that has one, so that one bad row in front does not hide it; and the rows read."""
    first: DataError | None = None
    seen: list[Row] = []
    for row in itertools.islice(rows, LOOKED_AT):
        seen.append(row)
        where = f"{row.origin}{row.number}"
        try:
            record = read_line(where, row.record) if isinstance(row.record, bytes) else row.record
            if isinstance(record, DataError):
                raise record
            return detect_format(record, where, columns), seen
        except DataError as error:
            first = first or error
        except KeyTwice as error:
            first = first or key_twice(where, error)
    assert first is not None, "called with rows"
    raise first
