"""One mistake in a config, and how its message shows values."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One mistake: the field's dotted path, what is wrong, and the other fields that the judgement rests on."""

    path: str
    text: str
    rests_on: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return f"{self.path}   {self.text}"


def shown(value: Any) -> str:
    """`value` as an error message shows it: text in quotes, the rest as YAML would have it, cut after 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(word: str, known: Any, cutoff: float = 0.6) -> str:
    """'; did you mean X?' for the nearest of `known`, '' if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""
