"""The rows of a config on this machine, before any run: tokenised into the cache, or shown.

`python -m sft_dist.data_here CONFIG.yaml` prepares the rows of a run's config.yaml, for workers that find none; an error
stands on the last line of stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, SftDistError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_here(config: Config) -> dict[str, Any]:
    """Tokenise the config's rows into the cache; returns the ledger."""
    from sft_dist.data.prepare import prepare
    from sft_dist.train.pretrained import cache_root
    from sft_dist.train.tokenizer import load_tokenizer

    tokens = load_tokenizer(config.model)
    return prepare(config, tokens.tokenizer, tokens.template, cache_root()).ledger


def preview_here(config: Config, rows: int, row: int) -> list[Any]:
    """What `data preview` prints: a table of the first `rows` rows, and the tokens of row number `row`."""
    from sft_dist.data.preview import rows_table, tokens_view
    from sft_dist.data.sources import load_examples
    from sft_dist.data.tokenize import IGNORED, tokenize
    from sft_dist.train.tokenizer import load_tokenizer

    data = config.data
    examples = load_examples(data.train, system=data.system, on_bad_row=data.on_bad_row)[0]
    if row > len(examples):
        raise ConfigError(f"--row {row}, but there are {len(examples)} rows", hint=f"choose 1 to {len(examples)}")
    tokens = load_tokenizer(config.model)
    chosen = next(
        tokenize(
            examples[row - 1 : row],
            tokens.tokenizer,
            tokens.template,
            max_length=data.max_length,
            loss_on=data.trained,
        )
    )
    trained = [label != IGNORED for label in chosen.labels]
    pieces = _pieces(tokens.tokenizer, chosen.input_ids, trained)
    return [rows_table(examples, rows), tokens_view(pieces, trained, title=examples[row - 1].where)]


def page_here(config: Config, rows: int, path: Path) -> Path:
    """Write `data preview --html`: the first `rows` rows as the model sees them, the worst first. Returns `path`."""
    from sft_dist.data.page import Sample, samples_page
    from sft_dist.data.preview import visible
    from sft_dist.data.sources import load_examples
    from sft_dist.data.tokenize import IGNORED, tokenize
    from sft_dist.files import write_text
    from sft_dist.train.tokenizer import load_tokenizer

    data = config.data
    examples = load_examples(data.train, system=data.system, on_bad_row="drop")[0][:rows]
    tokens = load_tokenizer(config.model)
    special, unknown = set(tokens.tokenizer.added_tokens_decoder), tokens.tokenizer.unk_token_id
    found = []
    # Uncut, so that what is beyond max_length is seen, too.
    whole = tokenize(examples, tokens.tokenizer, tokens.template, max_length=2**31, loss_on=data.trained)
    for number, (example, row) in enumerate(zip(examples, whole, strict=True), 1):
        trained = [label != IGNORED for label in row.labels]
        pieces = _pieces(tokens.tokenizer, row.input_ids, trained)
        kinds = [
            "c"
            if place >= data.max_length
            else "u"
            if token == unknown
            else "Bb"[not mark]
            if token in special
            else "tm"[not mark]
            for place, (token, mark) in enumerate(zip(row.input_ids, trained, strict=True))
        ]
        shown = [visible(piece, spaces=True).replace("\u21b5", "\u21b5\n") for piece in pieces]
        length = min(len(kinds), data.max_length)
        found.append(
            Sample(
                number,
                visible(example.where + (f": {row.problem}" if row.problem else "")),
                list(zip(kinds, shown, strict=True)),
                length,
                sum(trained[:length]),
                len(kinds) - length,
                kinds.count("u"),
            )
        )
    write_text(
        path, samples_page(found, f"{len(found)} rows of {config.run.name or 'a config'}, as the model sees them")
    )
    return path


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]) -> list[str]:
    """Each token as text; of several tokens that make up one character the last one shows it, the others nothing."""
    pieces: list[str] = []
    held: list[int] = []
    for index, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held)
        last = index + 1 == len(ids) or trained[index + 1] != trained[index]
        if text.endswith("\ufffd") and len(held) < 4 and not last:
            pieces.append("")
        else:
            pieces.append(text)
            held = []
    return pieces


def main(path: str) -> int:
    """Prepare the rows of a run's config; returns the exit status."""
    from sft_dist.config.loader import load_run_config
    from sft_dist.logs import log_to_stderr

    log_to_stderr()
    try:
        prepare_here(load_run_config(Path(path)))
    except SftDistError as error:
        sys.stdout.write(json.dumps({"message": error.message, "hint": error.hint}) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
