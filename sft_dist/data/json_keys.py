"""JSON of which no object has a key twice: which of the two values is meant cannot be told, and Python takes the last."""

from __future__ import annotations

import json
from typing import Any

from sft_dist.errors import DataError


class KeyTwice(Exception):
    """An object has the key that is the argument twice."""


def key_twice(where: str, error: KeyTwice) -> DataError:
    """The error for the row at `where`."""
    failure = DataError(
        f"{where}: an object has the key {error.args[0]!r} twice, and which of the two is meant cannot be told",
        hint="take one of them out, or give it another name",
    )
    failure.reason = "key_twice"
    return failure


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    raise KeyTwice(next(key for key in keys if keys.count(key) > 1))


# One for all: json.loads with a hook makes a decoder for each call, which takes longer than the hook.
ONCE = json.JSONDecoder(object_pairs_hook=_object)
