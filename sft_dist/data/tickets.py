"""A synthetic classification: customer requests of six categories, asked as a chat, answered with one word.

The words of a category never stand in a request, so that the answer must be inferred and cannot be copied.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

from sft_dist.data import tickets_en, tickets_zh
from sft_dist.data.tickets_en import CATEGORIES, INSTRUCTION, REQUESTS

__all__ = ["CATEGORIES", "INSTRUCTION", "REQUESTS"]


def tickets(rows: int, seed: int, language: Literal["en", "zh"] = "en") -> Iterator[dict[str, Any]]:
    """`rows` different rows with the categories in balance, the same for the same seed.

    Every six rows hold each category once, so a shorter set is the beginning of a longer one.
    """
    table = _table(language)
    rng = random.Random(f"tickets {seed}" if language == "en" else f"tickets {language} {seed}")
    seen: set[str] = set()
    for start in range(0, rows, len(table.CATEGORIES)):
        for category in rng.sample(table.CATEGORIES, k=len(table.CATEGORIES))[: rows - start]:
            request = _request(category, rng, language)[0]
            while request in seen:
                request = _request(category, rng, language)[0]
            seen.add(request)
            yield {
                "prompt": [{"role": "user", "content": f"{table.INSTRUCTION}\n\n{request}"}],
                "completion": [{"role": "assistant", "content": category}],
                "category": category,
                "expected": category,
                "metric": "exact_match",
            }


def letter(rng: random.Random, language: Literal["en", "zh"]) -> tuple[str, str, dict[str, str]]:
    """A request of any category, its category, and the values that stand in it (name, email, order, ...)."""
    category = rng.choice(_table(language).CATEGORIES)
    text, values = _request(category, rng, language)
    return text, category, values


def _table(language: str) -> ModuleType:
    return tickets_zh if language == "zh" else tickets_en


def _request(category: str, rng: random.Random, language: str) -> tuple[str, dict[str, str]]:
    table = _table(language)
    problems, asks = table.REQUESTS[category]
    values = _values(rng) if language == "en" else _values_zh(rng)
    parts = {
        "greeting": rng.choice(table.GREETINGS),
        "intro": rng.choice(table.INTROS).format(**values),
        "problem": rng.choice(problems).format(**values),
        "ask": rng.choice(asks).format(**values),
        "reference": rng.choice(table.REFERENCES).format(**values),
        "closing": rng.choice(table.CLOSINGS),
        "name": values["name"],
        "first_name": values["first_name"],
    }
    return rng.choice(table.LAYOUTS).format(**parts), values


def _values(rng: random.Random) -> dict[str, str]:
    first, last = rng.choice(tickets_en.FIRST_NAMES), rng.choice(tickets_en.LAST_NAMES)
    address = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{last}{rng.randint(60, 99)}")).lower()
    return {
        "first_name": first,
        "name": f"{first} {last}",
        "email": f"{address}@{rng.choice(tickets_en.DOMAINS)}",
        "order": f"{rng.choice('ABCDKLMNRST')}{rng.randint(10000, 99999)}",
        "product": rng.choice(tickets_en.PRODUCTS),
        "amount": f"{rng.randint(15, 480)}.{rng.choice(('00', '50', '90', '95', '99'))} euros",
        "date": f"{rng.randint(1, 28)} {rng.choice(tickets_en.MONTHS)}",
        "days": str(rng.randint(3, 19)),
        "weekday": rng.choice(tickets_en.WEEKDAYS),
        "code": f"E{rng.randint(10, 99)}",
    }


def _values_zh(rng: random.Random) -> dict[str, str]:
    name = rng.choice(tickets_zh.SURNAMES) + rng.choice(tickets_zh.GIVEN_NAMES)
    return {
        "first_name": name,
        "name": name,
        "email": f"{rng.choice(tickets_en.LAST_NAMES).lower()}{rng.randint(100, 99999)}@{rng.choice(tickets_en.DOMAINS)}",
        "order": f"{rng.choice('ABCDKLMNRST')}{rng.randint(10000, 99999)}",
        "product": rng.choice(tickets_zh.PRODUCTS),
        "amount": f"{rng.randint(99, 3999)}元",
        "date": f"{rng.randint(1, 12)}月{rng.randint(1, 28)}日",
        "days": str(rng.randint(3, 19)),
        "weekday": rng.choice(tickets_zh.WEEKDAYS),
        "code": f"E{rng.randint(10, 99)}",
    }
