"""The rows of one file, one after the other: memory does not grow with the file."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from sft_dist.data.json_rows import Row, iconv, json_rows, jsonl_rows, not_utf8
from sft_dist.data.paths import SAVED_SPLITS, is_saved, kind_of
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

# How files begin that are no text: what they hold, and what to do.
OPENINGS = {
    b"\x1f\x8b": ("gzip", "add the ending .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("zstd", "add the ending .zst to its name"),
    b"PAR1": ("Parquet", "give it the ending .parquet"),
    b"ARROW1": ("Arrow", "give it the ending .arrow"),
    b"PK\x03\x04": ("a zip archive", "unpack it; a spreadsheet (.xlsx) is to be saved as CSV in UTF-8"),
}
JSON_OPENINGS = (b"{", b"[{", b"[\n", b"[\r\n")


def file_rows(path: Path, name: str, split: str = "train") -> Iterator[Row]:
    """The rows of the file `path`, which messages call `name`; `split` is for folders that datasets saved.

    Raises DataError if the file cannot be read.
    """
    kind = kind_of(path)
    try:
        if is_saved(path):
            yield from _saved_rows(path, name, split)
        elif kind in ("parquet", "arrow"):
            yield from _table_rows(path, name, kind)
        else:
            with _unpacked(path) as stream:
                head = stream.peek(4096)
                _check_encoding(head, name)
                start = head.removeprefix(codecs.BOM_UTF8).lstrip()
                if kind == "csv":
                    if start.startswith(JSON_OPENINGS):
                        raise DataError(f"{name} holds JSON, not columns", hint="give it the ending .jsonl or .json")
                    yield from _csv_rows(stream, name, "\t" if ".tsv" in path.name.lower() else ",")
                    return
                # Lines of objects may stand in a .json file, and an array in a .jsonl file: the content decides.
                if kind == "json" or start.startswith(b"["):
                    yield from json_rows(stream, start, name, lambda: _unpacked(path))
                else:
                    yield from jsonl_rows(stream, name)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name} cannot be read: {reason}", hint="fetch or write the file again") from error


def _unpacked(path: Path) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(io.BufferedReader, gzip.open(path))
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _csv_rows(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        columns = next(reader, [])
        _refuse_twice(columns, name)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > 1 or any(cells):
                record: Any = dict(zip(columns, cells, strict=False))
                if len(cells) != len(columns):
                    record = DataError(
                        f"{name}:{line}: {len(cells)} cells under {len(columns)} columns",
                        hint="put quotes around cells that hold separators or line breaks",
                    )
                    record.reason = "wrong_cells"
                elif any("\0" in cell for cell in cells):
                    record = DataError(f"{name}:{line}: holds a NUL byte, which is no text", hint="write the row again")
                    record.reason = "not_text"
                yield Row(f"{name}:", line, record)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise not_utf8(error, f"{name} (after line {line})") from error
    except csv.Error as error:
        raise DataError(
            f"{name}:{line}: not valid CSV: {error}", hint='double quotes inside a cell: "a ""word"""'
        ) from error


def _refuse_twice(columns: list[str], name: str) -> None:
    """Raises DataError for two columns of one name: which of them a row means cannot be told."""
    # Columns without a name are what separators at the ends of lines leave; no format reads them.
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"{name} has {columns.count(twice)} columns with the name {twice!r}",
            hint="rename all but one of them, or take them out",
        )


def _table_rows(path: Path, name: str, kind: str) -> Iterator[Row]:
    import pyarrow

    try:
        batches = _parquet_batches(path) if kind == "parquet" else _arrow_batches(path)
        yield from _batch_rows(batches, name)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{name} is not valid {kind.capitalize()}: {textwrap.shorten(str(error), 120)}", hint="write the file again"
        ) from error


def _parquet_batches(path: Path) -> Iterator[RecordBatch]:
    from pyarrow import parquet

    # Else a whole group of rows is read ahead, and one may be all of the file.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        yield from file.iter_batches(batch_size=1000, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[RecordBatch]:
    """Batches of an Arrow file, which is either a stream or has a table of contents at its end."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        if path.open("rb").read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(source)


def _batch_rows(batches: Iterator[RecordBatch], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        _refuse_twice(batch.schema.names, name)
        for begin in range(0, batch.num_rows, 1000):
            for record in batch.slice(begin, 1000).to_pylist():
                number += 1
                yield Row(f"{name}: row ", number, record, table=True)


def _saved_rows(path: Path, name: str, split: str) -> Iterator[Row]:
    import datasets

    if (path / SAVED_SPLITS).is_file():
        splits = json.loads((path / SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise DataError(f"{name} has no split {split!r}", hint=f"its splits: {', '.join(splits)}")
        path = path / split
    table = datasets.load_from_disk(str(path))
    for number, record in enumerate(table, 1):
        yield Row(f"{name}: row ", number, dict(record), table=True)


def _check_encoding(head: bytes, name: str) -> None:
    """Raises DataError for content that is no text in UTF-8 by how it begins."""
    for opening, (what, hint) in OPENINGS.items():
        if head.startswith(opening):
            raise DataError(f"{name} holds {what}, not text", hint=hint)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is UTF-16 text; files must be UTF-8", hint=iconv("UTF-16"))
    # Further down a NUL is a matter of one row: what a disk leaves that was full, or lost its power.
    if b"\0" in head.partition(b"\n")[0]:
        raise DataError(f"{name} is binary or UTF-16, not UTF-8 text", hint=iconv("UTF-16"))
