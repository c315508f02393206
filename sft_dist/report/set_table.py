"""The scores of one evaluation set for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft_dist.report.scores import MAX_NAME, Cell, score_lines
from sft_dist.report.text import clip, plain, visible

if TYPE_CHECKING:
    from rich.table import Table


def set_table(name: str, part: dict[str, Any], *, wide: bool = True) -> Table:
    """A set of scores.json as a table: each score over all rows, then the first one by category.

    `wide` has the 95 % intervals; without them it fits into 60 columns.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Set {visible(clip(name, MAX_NAME))}"), title_justify="left")
    table.add_column("")
    for title in ("n", "before", "after", "change", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    lines = score_lines(part)
    for place, line in enumerate(lines):
        label = line.score if line.category is None else f"{line.category}, {line.score}"
        cells = [_shown(cell, wide) for cell in (line.before, line.after, line.change)]
        last = line.category is None and place + 1 < len(lines) and lines[place + 1].category is not None
        table.add_row(Text(label), plain(line.n), *map(Text, cells), line.p_value, end_section=last)
    if wide and any(line.before.interval or line.after.interval for line in lines):
        table.caption = "in brackets: 95 % bootstrap intervals; p: exact McNemar or permutation test, paired"
        table.caption_justify = "left"
    return table


def _shown(cell: Cell, wide: bool) -> str:
    return f"{cell.text} {cell.interval}" if wide and cell.interval else cell.text
