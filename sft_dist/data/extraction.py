"""A synthetic extraction: name, e-mail and order number out of a customer's letter, as JSON or as plain fields."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Literal

from sft_dist.data.tickets import letter

INSTRUCTIONS = {
    ("en", "json"): 'Read the letter and answer with JSON only: {"name": ..., "email": ..., "order": ...}',
    ("en", "fields"): "Read the letter and answer with three lines only: name: ..., email: ..., order: ...",
    ("zh", "json"): '请阅读来信，只用JSON回答：{"name": 姓名, "email": 邮箱, "order": 订单号}',
    ("zh", "fields"): "请阅读来信，只用三行回答：姓名：……，邮箱：……，订单号：……",
}
LABELS = {"en": ("name: ", "email: ", "order: "), "zh": ("姓名：", "邮箱：", "订单号：")}
FIELDS = ("name", "email", "order")


def extraction(
    rows: int, seed: int, language: Literal["en", "zh"] = "en", answer: Literal["json", "fields"] = "json"
) -> Iterator[dict[str, Any]]:
    """`rows` different rows, the same for the same seed; `expected` is the answer, `metric` how it is scored.

    `values` holds the three fields by themselves.
    """
    rng = random.Random(f"extraction {language} {seed}")
    seen: set[str] = set()
    while len(seen) < rows:
        text, category, values = letter(rng, language)
        # One layout leaves the sender's name out, and another gives the first name only beside the full one.
        if text in seen or values["name"] not in text:
            continue
        seen.add(text)
        found = {field: values[field] for field in FIELDS}
        if answer == "json":
            expected = json.dumps(found, ensure_ascii=False)
        else:
            expected = "\n".join(label + found[field] for label, field in zip(LABELS[language], FIELDS, strict=True))
        yield {
            "prompt": [{"role": "user", "content": f"{INSTRUCTIONS[language, answer]}\n\n{text}"}],
            "completion": [{"role": "assistant", "content": expected}],
            "category": category,
            "values": found,
            "expected": expected,
            "metric": answer,
        }
