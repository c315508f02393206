"""How values read in a report: numbers, durations, times, and text from data with nothing invisible in it."""

from __future__ import annotations

import datetime
import json
import math
import re
from typing import Any

from sft_dist.files import moment

NONE = "-"  # stands where there is no value

# Controls (but tab and newline), soft hyphen, bidi marks and overrides, zero-width characters, line separators,
# lone surrogates (which UTF-8 cannot hold) and tags. The joiners U+200C and U+200D stay: scripts and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with every invisible or direction-changing character written out as <U+202E>."""
    return _INVISIBLE.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def clip(text: str, limit: int) -> str:
    """`text`, cut after `limit` characters with a note of how many are left out, unless the note is no shorter than these."""
    note = f" ... ({len(text) - limit:,} more characters)"
    return text if len(text) <= limit + len(note) else f"{text[:limit]}{note}"


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a dict, else {}: files of a run may be damaged or written by hand."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """`value` as a finite float; None if it is anything else, or too large to draw."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e30 else None


def plain(value: Any) -> str:
    """One value of a JSON file as a person writes it."""
    if value is None or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return (
            f"{value:,}" if abs(value) < 10**15 else f"{value:.3e}" if abs(value) < 10**300 else "a very large number"
        )
    if isinstance(value, float):
        return f"{value:,.4g}" if not math.isfinite(value) or abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return ", ".join(plain(item) for item in value) or NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def percent(share: float | None) -> str:
    """A share of 1 as a percentage with one decimal."""
    return NONE if share is None else f"{share * 100:.1f}%"


def clock(value: Any) -> str:
    """An ISO 8601 time in UTC to the second; other values as they are."""
    time = moment(value)
    return plain(value) if time is None else f"{time.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float | None) -> str:
    """A span of time in its two largest units."""
    if seconds is None:
        return NONE
    whole = max(0, round(seconds))
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60))
    parts = [f"{count} {unit}" for unit, count in units if count]
    return " ".join(parts[:2]) or "0 s"
