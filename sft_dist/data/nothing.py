"""The error for rows that can be read, of which nothing is left to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.errors import DataError

if TYPE_CHECKING:
    from sft_dist.data.tokenize import MaskedRow

WHY = {"refused": "the chat template refuses it", "empty": "the answer has no tokens, or none that is trained"}


def no_words(row: MaskedRow) -> str:
    """Why no word of a row's answers is trained, although the template takes it."""
    if row.trained.any():
        return "the answer tokenises to nothing"
    return "none of its answers is trained, as data.loss_on and its messages' train or weight say"


class NothingTrained(DataError):
    """`of` is the field of the config that names the rows."""

    def __init__(self, of: str, limit: int, counts: Sequence[dict[str, Any]]) -> None:
        usable = sum(one["usable"] for one in counts)
        lines = [f"{of}: none of the {usable} rows has an answer within data.max_length {limit} tokens"]
        whys = [(sum(one[name] for one in counts), why) for name, why in WHY.items()]
        lines += [f"{count} of them: {why}" for count, why in whys if count]
        lines += [one["first"] for one in counts if one["first"] is not None][:1]
        hint = "`sft-dist data preview CONFIG --html page.html` shows the rows"
        if sum(one["cut_off"] for one in counts):
            hint = f"raise data.max_length; {hint}"
        super().__init__("\n  ".join(lines), hint=hint)
        self.of = of
