"""Rows that stand in JSON: a line each, or the items of one array, which is read piece by piece."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from sft_dist.errors import DataError

PIECE = 2**20
# Of one line, but a file in another encoding is no matter of one row.
NOT_UTF8 = "not_utf8"
WHITE = " \t\r\n"


class Row(NamedTuple):
    """A row as it stands in its source: `record` is bytes where a line of JSON is still to be read."""

    origin: str
    """What stands before the number in messages: `rows.jsonl:` or `rows.json: row `."""
    number: int
    record: Any


def read_line(where: str, line: bytes) -> Any:
    """The JSON value of a line. Raises DataError with `where` if it holds none."""
    try:
        return json.loads(decode(line, where).strip())
    except (ValueError, RecursionError) as error:
        raise bad_json(where, error) from error


def bad_json(where: str, error: Exception) -> DataError:
    """The error for a line that is not JSON."""
    failure = DataError(f"{where}: {_not_json(error)}", hint="one whole JSON object a line")
    failure.reason = "not_json"
    return failure


def decode(raw: bytes, where: str) -> str:
    """`raw` as text. Raises DataError with the place of what is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, where) from error


def not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    byte = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
    failure = DataError(f"{where} is not UTF-8 text ({byte})", hint=iconv("LATIN1"))
    failure.reason = NOT_UTF8
    return failure


def iconv(encoding: str) -> str:
    """The command that makes UTF-8 of a file."""
    return f"convert it, if it is {encoding}: iconv -f {encoding} -t UTF-8 OLD_FILE > NEW_FILE"


def jsonl_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    """The lines that are not empty, unread."""
    # Split at \n in bytes: text mode and splitlines() would also split at characters that may stand inside a string.
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield Row(f"{name}:", number, line)


def json_rows(stream: BinaryIO, start: bytes, name: str, reopen: Callable[[], BinaryIO]) -> Iterator[Row]:
    """The items of an array, those of {"data": [...]}, or the lines of a file whose content is JSON Lines after all.

    `start` is how the content begins. Raises DataError if it is none of these.
    """
    if start.startswith(b"["):
        taken = 0
        try:
            for taken, record in enumerate(_array(stream, name), 1):
                yield Row(f"{name}: row ", taken, record)
            return
        except _NotAnArray:
            # The parser of whole files says best what is wrong, and where.
            with reopen() as again:
                text = decode(again.read(), name)
    else:
        taken, text = 0, decode(stream.read(), name)
    yield from itertools.islice(_whole_json_rows(text, name), taken, None)


def _whole_json_rows(text: str, name: str) -> Iterator[Row]:
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from jsonl_rows(io.BytesIO(text.encode()), name)
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
        yield Row(f"{name}: row ", number, record)


class _NotAnArray(Exception):
    """A file that begins like a JSON array and is none."""


def _array(stream: BinaryIO, name: str) -> Iterator[Any]:
    """The items of a JSON array, read piece by piece. Raises _NotAnArray where it is not one."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, at, ended, first = "", 0, False, True

    def more() -> bool:
        nonlocal text, at, ended
        # Twice as much each time, so that a long item is not begun again for every piece.
        piece = stream.read(max(PIECE, len(text) - at))
        ended = not piece
        try:
            text, at = text[at:] + utf8.decode(piece, final=ended), 0
        except UnicodeDecodeError as error:
            raise _NotAnArray from error
        return not ended

    def next_sign() -> str:
        nonlocal at
        while True:
            while at < len(text) and text[at] in WHITE:
                at += 1
            if at < len(text):
                return text[at]
            if not more():
                raise _NotAnArray

    if next_sign() != "[":
        raise _NotAnArray
    at += 1
    while next_sign() != "]":
        if not first:
            if text[at] != ",":
                raise _NotAnArray
            at += 1
            next_sign()
        while True:
            try:
                item, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not more():
                    raise _NotAnArray from error
                continue
            # A number at the end of what was read may go on in the next piece.
            if end < len(text) or not more():
                break
        at, first = end, False
        yield item
    rest = text[at + 1 :]
    while rest.strip() == "" and not ended:
        at = len(text)
        more()
        rest = text
    if rest.strip():
        raise _NotAnArray


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return f"not valid JSON: {textwrap.shorten(str(error), 80)}"
