"""What the model will see: a table of rows, and the tokens of one row by whether they are trained on.

Data is shown as it is: rich markup in it stays text, and characters that would move the cursor, hide or reorder text
are spelled out, so that a file from elsewhere cannot play tricks on a terminal.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sft_dist.data.example import Example, prompt_messages

NEWLINE, SPACE, TAB, CUT = "\u21b5", "\u00b7", "\u21e5", "\u2026"
# Lines of the ledger's table for numbers that stand together; characters of its first column at most, and of a source's name on one line.
MOST_LINES, LABEL, SOURCE = 8, 35, 14
# Around every trained span, so that it is seen without colour; where the data holds these signs, they are spelled out.
OPEN, CLOSE = "\u27e6", "\u27e7"
TRAINED_STYLES = ("bold green", "bold bright_green")  # in turn, so that neighbouring tokens are told apart
MASKED_STYLES = ("dim", "dim italic")
# Control, format (also bidirectional overrides), surrogate, private and unassigned characters, odd line ends.
SPELLED_OUT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def rows_table(examples: Sequence[Example], limit: int = 10, *, width: int = 160) -> Table:
    """A table of the first `limit` rows: number, what the user asks, what the assistant answers.

    Texts longer than `width` characters are cut. Of a conversation with several turns the last is shown.
    """
    shown = examples[:limit]
    table = Table(title=f"{len(shown)} of {len(examples)} rows", title_justify="left", show_lines=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("user", overflow="fold", ratio=3)
    table.add_column("assistant", overflow="fold", ratio=2)
    for number, example in enumerate(shown, 1):
        question, answer = _last_turn(example)
        table.add_row(Text(str(number)), _cut(question, width), _cut(answer, width))
    return table


def ledger_table(ledger: Mapping[str, Any], width: int) -> Group:
    """The ledger's numbers: a column for each source, and for each split as a whole; as many tables as `width` asks for."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for split in ("train", "eval"):
        numbers = ledger.get(split)
        if numbers:
            sources = numbers.get("sources", ())
            columns += [
                (f"{split}: {one['source']} ({one['format']})", _flat(one)) for one in sources if len(sources) > 1
            ]
            columns.append((split, _flat(numbers)))
    # A split as a whole has all numbers, in their order.
    whole_first = sorted(columns, key=lambda column: column[0] not in ("train", "eval"))
    names = list(dict.fromkeys(name for _, numbers in whole_first for name in numbers))
    label = min(LABEL, max(map(len, names), default=1))
    beside = max(1, (width - label - 4) // (SOURCE + 3))
    groups = [columns[at : at + beside] for at in range(0, len(columns), beside)]
    tables = [_ledger_columns(names, label, group) for group in groups]
    return Group(Text(f"rows {ledger['key']}", style="italic"), *tables)


def _ledger_columns(names: Sequence[str], label: int, columns: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = Table()
    table.add_column("", overflow="fold", width=label)
    for name, numbers in columns:
        longest = max((len(f"{value:,}") for value in numbers.values()), default=1)
        # The name of a source may be folded, its numbers may not.
        table.add_column(
            Text(visible(name)), justify="right", overflow="fold", min_width=max(longest, min(len(name), SOURCE))
        )
    for name in names:
        values = [numbers.get(name) for _, numbers in columns]
        if any(value is not None for value in values):
            table.add_row(Text(name), *("" if value is None else f"{value:,}" for value in values))
    return table


def _flat(numbers: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers by what a line calls them; of those that stand together (reasons, percentiles, texts) the first ones."""
    found: dict[str, int | float] = {}
    for name, value in numbers.items():
        called = name.replace("_", " ")
        if isinstance(value, int | float):
            found[called] = value
        elif isinstance(value, dict):
            of = (
                (key if name in ("unknown_texts", "special_texts") else key.replace("_", " "), count)
                for key, count in value.items()
            )
            found |= {f"{called}: {visible(key)}": count for key, count in itertools.islice(of, MOST_LINES)}
    return found


def tokens_view(
    tokens: Sequence[str], trained: Sequence[bool], *, title: str | None = None, notes: Sequence[str] = ()
) -> Group:
    """The decoded `tokens` of one row, those with `trained` in colour and in brackets, below a legend with counts and `notes`.

    Spaces, tabs and line ends are visible. Raises ValueError if the two sequences differ in length.
    """
    if len(tokens) != len(trained):
        raise ValueError(f"{len(tokens)} tokens but {len(trained)} marks")
    body = Text(overflow="fold")
    inside = False
    line_ended = False
    for index, (token, is_trained) in enumerate(zip(tokens, trained, strict=True)):
        if inside and not is_trained:
            body.append(CLOSE, style=TRAINED_STYLES[0])
        # The break waits for the bracket, which belongs to the line that it closes.
        if line_ended:
            body.append("\n")
        if is_trained and not inside:
            body.append(OPEN, style=TRAINED_STYLES[0])
        inside = is_trained
        styles = TRAINED_STYLES if is_trained else MASKED_STYLES
        signs = visible(token, spaces=True).replace(NEWLINE, f"{NEWLINE}\n").removesuffix("\n")
        body.append(signs, style=styles[index % 2])
        line_ended = token.endswith("\n")
    if inside:
        body.append(CLOSE, style=TRAINED_STYLES[0])
    heading = [Text(visible(title), style="bold")] if title else []
    said = [Text(visible(note), style="bold red") for note in notes]
    return Group(*heading, _legend(len(tokens), sum(map(bool, trained))), *said, Text(), body)


def visible(text: str, *, spaces: bool = False) -> str:
    """`text` on one line with every character seen: line ends and tabs as signs, control characters as escapes."""
    return "".join(_seen(char, spaces) for char in text)


def _seen(char: str, spaces: bool) -> str:
    if char == "\n":
        return NEWLINE
    if char == "\t":
        return TAB
    if char == " ":
        return SPACE if spaces else char
    if unicodedata.category(char) in SPELLED_OUT or char in (NEWLINE, OPEN, CLOSE):
        return char.encode("unicode_escape", "surrogatepass").decode("ascii")
    return char


def _legend(total: int, trained: int) -> Text:
    share = f"{100 * trained / total:.1f} %" if total else "0 %"
    legend = Text.assemble((f"{OPEN}trained{CLOSE}", TRAINED_STYLES[0]), "  ", ("masked", MASKED_STYLES[0]))
    legend.append(f"   {total} tokens, {trained} trained ({share}), {total - trained} masked")
    return legend


def _last_turn(example: Example) -> tuple[str, str]:
    if not example.messages:
        return example.prompt or "", example.completion or ""
    before = prompt_messages(example)
    question = next((m["content"] for m in reversed(before) if m["role"] in ("user", "tool")), "")
    turns = sum(m["role"] == "assistant" for m in example.messages)
    answer = example.messages[len(before)]["content"] if len(before) < len(example.messages) else ""
    return (f"({turns} turns, the last:) {question}" if turns > 1 else question), answer


def _cut(text: str, width: int) -> Text:
    return Text(visible(text if len(text) <= width else text[: width - 1] + CUT))
