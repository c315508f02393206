"""Rows that stand in JSON: a line each, or the items of one array, which is read piece by piece."""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from sft_dist.data.json_keys import ONCE, KeyTwice, key_twice
from sft_dist.errors import DataError

PIECE = 2**20
# Of one line, but a file in another encoding is no matter of one row.
NOT_UTF8 = "not_utf8"
WHITE = " \t\r\n"
# And nothing, which is what stands behind the last sign.
NUMBER = ("", *"0123456789.eE+-")


class Row(NamedTuple):
    """A row as it stands in its source: `record` is bytes where a line of JSON is still to be read."""

    origin: str
    """What stands before the number in messages: `rows.jsonl:` or `rows.json: row `."""
    number: int
    record: Any
    table: bool = False
    """Whether it is of a table, where objects of one column share their keys: null stands for those that one lacks."""


def read_line(where: str, line: bytes) -> Any:
    """The JSON value of a line. Raises DataError with `where` if it holds none."""
    try:
        return ONCE.decode(decode(line, where).strip())
    except KeyTwice as error:
        raise key_twice(where, error) from error
    except (ValueError, RecursionError) as error:
        failure = DataError(f"{where}: {_not_json(error)}", hint="one whole JSON object a line")
        failure.reason = "not_json"
        raise failure from error


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
    if start.startswith(b"{") and _holds_lines(reopen):
        yield from jsonl_rows(stream, name)
        return
    taken = 0
    try:
        for taken, record in enumerate(_items(stream), 1):
            twice = isinstance(record, KeyTwice)
            yield Row(f"{name}: row ", taken, key_twice(f"{name}: row {taken}", record) if twice else record)
    except _NotInOne:
        # The parser of whole files says best what is wrong, and where.
        with reopen() as again:
            text = decode(again.read(), name)
        yield from itertools.islice(_whole_json_rows(text, name, bool(taken)), taken, None)


def _holds_lines(reopen: Callable[[], BinaryIO]) -> bool:
    """Whether the first line is an object and more follows. A file in one line is not taken into memory for that."""
    with reopen() as stream:
        before = length = 0
        while piece := stream.readline(PIECE):
            length += len(piece)
            if length == len(piece) and not piece.removeprefix(codecs.BOM_UTF8).strip():
                before, length = before + length, 0
            elif piece.endswith(b"\n"):
                break
        if not any(piece.strip() for piece in iter(functools.partial(stream.readline, PIECE), b"")):
            return False
    with reopen() as stream:
        stream.read(before)
        try:
            return isinstance(json.loads(stream.read(length).decode("utf-8-sig")), dict)
        except (ValueError, RecursionError):
            return False


def _whole_json_rows(text: str, name: str, begun: bool) -> Iterator[Row]:
    """The rows of what could not be read piece by piece; of lines only if no row has been taken of it as one value."""
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and not begun:
            yield from jsonl_rows(io.BytesIO(text.encode()), name)
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: {_not_json(error)}", hint='a right file: [{"messages": [...]}, ...]') from error
    if isinstance(value, dict) and begun:
        raise DataError(f'{name} holds "data" more than once', hint="join the lists, or write a file for each")
    if not isinstance(value, list):
        raise DataError(
            f'{name} holds one JSON {"object" if isinstance(value, dict) else "value"} without a list "data"',
            hint='a right file: [{"messages": [...]}, ...] or {"data": [...]}; rows one a line belong in a .jsonl file',
        )
    for number, record in enumerate(value, 1):
        yield Row(f"{name}: row ", number, record)


class _NotInOne(Exception):
    """What is neither a JSON array nor an object with an array "data"."""


def _items(stream: BinaryIO) -> Iterator[Any]:
    """The items of a JSON array, or of the array "data" of an object, read piece by piece. Raises _NotInOne."""
    text = _Pieces(stream)
    yield from text.items() if text.sign() == "[" else text.data()
    text.end()


class _Pieces:
    """JSON text of which only the value that is being read is in memory. Each method raises _NotInOne at what is not JSON."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.utf8 = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0

    def more(self) -> bool:
        """Read on; False at the end."""
        # Twice as much each time, so that a long item is not begun again for every piece.
        piece = self.stream.read(max(PIECE, len(self.text) - self.at))
        try:
            self.text, self.at = self.text[self.at :] + self.utf8.decode(piece, final=not piece), 0
        except UnicodeDecodeError as error:
            raise _NotInOne from error
        return bool(piece)

    def sign(self) -> str:
        """The next character that is not white, not yet taken."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in WHITE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                raise _NotInOne

    def take(self, sign: str) -> None:
        if self.sign() != sign:
            raise _NotInOne
        self.at += 1

    def value(self) -> Any:
        """The value that begins here; KeyTwice, not raised, in place of one that has a key twice: others may follow it."""
        self.sign()
        decoder, twice = ONCE, None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except KeyTwice as error:
                decoder, twice = json.JSONDecoder(), error  # which finds the end
                continue
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self.more():
                    raise _NotInOne from error
                continue
            # A number at the end of what was read may go on in the next piece.
            if self.text[end : end + 1] not in NUMBER or not self.more():
                self.at = min(end, len(self.text))
                return twice or value

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here."""
        self.take("[")
        first = True
        while self.sign() != "]":
            if not first:
                self.take(",")
            first = False
            yield self.value()
        self.at += 1

    def data(self) -> Iterator[Any]:
        """The items of "data" in the object that begins here; what else it holds is passed over."""
        self.take("{")
        keys: list[str] = []
        while self.sign() != "}":
            if keys:
                self.take(",")
            if self.sign() != '"':
                raise _NotInOne
            keys.append(self.value())
            self.take(":")
            if keys[-1] == "data" and self.sign() == "[" and keys.count("data") == 1:
                yield from self.items()
            else:
                self.value()
                if keys[-1] == "data":
                    raise _NotInOne
        self.at += 1
        if "data" not in keys:
            raise _NotInOne

    def end(self) -> None:
        """Only white may follow."""
        while not self.text[self.at :].strip(WHITE):
            self.at = len(self.text)
            if not self.more():
                return
        raise _NotInOne


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return f"not valid JSON: {textwrap.shorten(str(error), 80)}"
