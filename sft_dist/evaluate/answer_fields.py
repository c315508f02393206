"""What an answer says field by field: JSON objects, and lines of `name: value`."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

FENCE = re.compile(r"\A```[A-Za-z]*\s*\n(.*?)\n?```\Z", re.DOTALL)


def normalised(text: str) -> str:
    """Full-width letters, digits and spaces as plain ones (NFKC), runs of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, text after `normalised`; a number is not the text that spells it."""
    if isinstance(one, str) and isinstance(other, str):
        return normalised(one) == normalised(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return type(one) in (int, float, type(None)) and type(other) in (int, float, type(None)) and one == other


def json_scores(answer: str, expected: str) -> dict[str, float]:
    """json_valid: the answer is a JSON object and nothing else (a code fence aside). json_all: it is, and equals the
    expected one. json_fields: the share of expected fields that are right in the first JSON object of the answer; of each
    field, `json.NAME`.

    Raises ValueError if `expected` is no JSON object.
    """
    wanted = _object(expected)
    if wanted is None:
        raise ValueError("the expected answer is no JSON object")
    body = answer.strip()
    fenced = FENCE.match(body)
    given = _object(fenced[1] if fenced else body)
    found = _first_object(body) if given is None else given
    right = {name: float(name in (found or {}) and same((found or {})[name], value)) for name, value in wanted.items()}
    return {
        "json_all": float(given is not None and same(given, wanted)),
        "json_valid": float(given is not None),
        "json_fields": sum(right.values()) / len(right) if right else float(found == {}),
        **{f"json.{name}": value for name, value in right.items()},
    }


def plain_scores(answer: str, expected: str) -> dict[str, float]:
    """fields_all: every expected `name: value` line is right. fields: the share that is; of each, `fields.NAME`.

    Names are compared without case. Raises ValueError if `expected` has no such line.
    """
    wanted, given = _lines(expected), _lines(answer)
    if not wanted:
        raise ValueError("the expected answer has no line `name: value`")
    right = {name: float(given.get(name) == value) for name, value in wanted.items()}
    share = sum(right.values()) / len(right)
    return {"fields_all": float(share == 1.0), "fields": share, **{f"fields.{name}": it for name, it in right.items()}}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _first_object(text: str) -> dict[str, Any] | None:
    decoder = json.JSONDecoder()
    for found in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _lines(text: str) -> dict[str, str]:
    """The first value of each name, normalised; a full-width colon is one, too."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = normalised(line).partition(":")
        if colon and name.strip():
            fields.setdefault(name.strip().casefold(), value.strip())
    return fields
