"""Scores and answers for the terminal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.files import read_json, read_jsonl
from sft_dist.report.samples import Answer, Sample, pair_samples
from sft_dist.report.scores import sets_of
from sft_dist.report.set_table import set_table
from sft_dist.report.text import NONE, clip, mapping, visible
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

MAX_ROWS = 10
SHOWN_AT_THE_END = 4
MAX_CHARACTERS = 300


def result_tables(run: RunDir) -> list[Table]:
    """What a command shows of a run at its end: a few answers side by side, and the scores; [] if there are none."""
    before, after = (read_jsonl(run.eval / f"{when}.jsonl") for when in ("before", "after"))
    scores = read_json(run.scores)
    tables = [answers_table(before, after, limit=SHOWN_AT_THE_END)] if before or after else []
    wide = shutil.get_terminal_size().columns >= 100
    if not scores:
        return tables
    found = [set_table(name, part, wide=wide) for name, part in sets_of(mapping(scores))]
    return [*tables, *found]


def answers_table(
    before_rows: Iterable[dict[str, Any]], after_rows: Iterable[dict[str, Any]], *, limit: int = MAX_ROWS
) -> Table:
    """Answers side by side: the questions, then scored rows, those that changed first; at most `limit` of each."""
    from rich.table import Table

    questions, scored = pair_samples(before_rows, after_rows)
    table = Table(title="Answers", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=3, overflow="fold")
    if scored:
        table.add_column("expected", ratio=1, overflow="fold")
    table.add_column("before", ratio=2, overflow="fold")
    table.add_column("after", ratio=2, overflow="fold")
    opening = _shared_opening(scored)
    for sample in (*questions[:limit], *scored[:limit]):
        expected = [_safe(NONE if sample.expected is None else sample.expected)] if scored else []
        asked = _asked(sample)
        shown = f"... {asked[len(opening) :]}" if opening and sample in scored else asked
        table.add_row(_safe(shown), *expected, _said(sample.before), _said(sample.after))
    more = max(0, len(questions) - limit) + max(0, len(scored) - limit)
    if more:
        table.caption = f"{more:,} more in the run's eval folder"
    return table


def _shared_opening(samples: Sequence[Sample]) -> str:
    """The words with which every prompt begins (the task's instruction); "" if they are few."""
    common = os.path.commonprefix([_asked(sample) for sample in samples]) if len(samples) > 1 else ""  # noqa: RUF071 characters are meant
    common = common[: max(common.rfind(" "), common.rfind("\n")) + 1]
    return common if len(common) > 40 else ""


def _asked(sample: Sample) -> str:
    """The last turn, which is what the answer is about; the report has the whole conversation."""
    return sample.prompt[-1][1] if sample.prompt else ""


def _said(answer: Answer | None) -> Text:
    if answer is None:
        return _safe(NONE)
    text = _safe(answer.text or "(empty)")
    if answer.right is not None:
        text.append("\nright" if answer.right else "\nwrong", style="green" if answer.right else "red")
    if answer.label is not None:
        # The label with the highest likelihood, which may differ from what was generated.
        text.append(f"\nlabel: {visible(answer.label)}", style="dim")
    return text


def _safe(value: str) -> Text:
    """Text in which neither rich's markup nor the terminal's escape codes have an effect."""
    from rich.text import Text

    return Text(visible(clip(value, MAX_CHARACTERS)))
