"""The rows of a config on this machine, before any run: tokenised into the cache, or shown.

`python -m sft_dist.data_here CONFIG.yaml` prepares the rows of a run's config.yaml, for workers that find none; an error
stands on the last line of stdout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config, ModelConfig
from sft_dist.errors import ConfigError, DataError, SftDistError

if TYPE_CHECKING:
    from sft_dist.data.notes import Ints
    from sft_dist.data.prepared import Prepared
    from sft_dist.data.tokenize import MaskedRow
    from sft_dist.train.tokenizer import RunTokenizer


def prepare_here(config: Config) -> dict[str, Any]:
    """Tokenise the config's rows into the cache; returns the ledger."""
    # Libraries speak on stdout while a model is converted, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        _leave_out_torch(config.model)
        from sft_dist.data.prepare import prepare
        from sft_dist.train.pretrained import cache_root
        from sft_dist.train.tokenizer import load_tokenizer

        tokens = load_tokenizer(config.model)
        return prepare(config, tokens.tokenizer, tokens.template, cache_root()).ledger


def preview_here(config: Config, rows: int, row: int) -> list[Any]:
    """What `data preview` prints: a table of the first `rows` rows, and the tokens of row number `row`, and what is lost of it."""
    _leave_out_torch(config.model)
    from sft_dist.data.preview import rows_table, tokens_view
    from sft_dist.data.sources import load_examples
    from sft_dist.data.tokenize import Masks
    from sft_dist.data.view import decoder, pieces
    from sft_dist.train.tokenizer import load_tokenizer

    data = config.data
    examples = load_examples(data.train, system=data.system, on_bad_row=data.on_bad_row)[0]
    if not 1 <= row <= len(examples):
        raise ConfigError(f"--row {row}, but there are {len(examples)} rows", hint=f"choose 1 to {len(examples)}")
    if rows < 0:
        raise ConfigError(f"--rows {rows} is below 0", hint="set how many rows the table shows")
    tokens = load_tokenizer(config.model)
    example = examples[row - 1]
    found = next(Masks(tokens.tokenizer, tokens.template, data.trained).rows([example]))
    ids, trained = found.ids[: data.max_length].tolist(), found.trained[: data.max_length].tolist()
    texts = pieces(decoder(tokens.tokenizer), ids, trained)
    notes = _untrained(config, found, tokens.tokenizer.eos_token_id)
    return [rows_table(examples, rows), tokens_view(texts, trained, title=example.where, notes=notes)]


def _leave_out_torch(model: ModelConfig) -> None:
    """Have the libraries do without torch in a process of ours: no tokenizer needs it, and its import takes the longest by far.

    Called before transformers is imported, which looks for torch once.
    """
    from sft_dist.process import leave_out
    from sft_dist.train.pretrained import resolve_model

    if model.trust_remote_code:  # its own code may need anything
        return
    resolve_model(model.tokenizer or model.name)  # an embedded model that is not there yet is built, with torch
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    leave_out(["torch"])


def _untrained(config: Config, row: MaskedRow, eos: int | None) -> list[str]:
    """What of a row is not trained on although it is an answer, and why."""
    from sft_dist.data.nothing import no_words

    if row.problem:
        return [f"left out: {row.problem}"]
    limit, whole, kept = (
        config.data.max_length,
        int(row.trained.sum()),
        int(row.trained[: config.data.max_length].sum()),
    )
    cut = max(0, len(row.ids) - limit)
    if not (row.trained & (row.ids != eos)).any():
        return [f"left out: {no_words(row)}"]
    if cut and config.data.packing and config.data.packing_overflow == "split":
        return [f"{cut} tokens beyond max_length {limit} become further documents; {whole - kept} of them are trained"]
    said = [f"{cut} tokens beyond max_length {limit} are cut off, {whole - kept} of them trained ones"] if cut else []
    return said if kept else [*said, "left out: nothing of its answer is within max_length"]


def page_here(config: Config, rows: int, path: Path) -> Path:
    """Write `data preview --html`: at most `rows` of the prepared rows, those worth a look first. Returns `path`."""
    from sft_dist.data.notes import read_notes
    from sft_dist.data.nothing import NothingTrained
    from sft_dist.data.page import samples_page
    from sft_dist.data.prepared import prepared_folder
    from sft_dist.data.view import view, view_left_out
    from sft_dist.files import write_text
    from sft_dist.train.pretrained import cache_root
    from sft_dist.train.tokenizer import load_tokenizer

    tokens = load_tokenizer(config.model)
    try:
        config, prepared = _prepared(config, tokens)
    except NothingTrained as error:
        if error.of != "data.train":
            raise
        lost = view_left_out(config, tokens.tokenizer, tokens.template, rows)
        name = f"{len(lost):,} rows of {config.run.name or 'a config'}, none of which is trained on"
        write_text(path, samples_page(lost, name, error.message.splitlines()))
        return path
    notes = read_notes(prepared_folder(cache_root(), prepared.ledger["key"]))
    padding = _padding(config, prepared)
    found = view(config, prepared, notes, tokens.tokenizer, tokens.template, rows, padding)
    train, whole = prepared.ledger["train"], len(notes.sizes) + len(notes.left_out)
    name = f"rows of {config.run.name or 'a config'}, as the model sees them"
    title = f"{len(found):,} {name}" if len(found) == whole else f"{len(found):,} of {whole:,} {name}"
    left_out = {**train["dropped_reasons"], "nothing to train on": len(notes.left_out)}
    told = [f"{reason.replace('_', ' ')} {count:,}" for reason, count in left_out.items() if count]
    said = [f"{train['rows_in']:,} rows read, {train['tokens']:,} tokens, {train['trained_tokens']:,} of them trained."]
    said += [f"Left out: {', '.join(told)}."] if told else []
    said += ["Padding: up to the longest row of the micro batch, in the first epoch."] if padding is not None else []
    write_text(path, samples_page(found, title, said))
    return path


def _prepared(config: Config, tokens: RunTokenizer) -> tuple[Config, Prepared]:
    """The rows, from the cache if they are there. What is wrong with them is to be seen, so that no limit counts."""
    from sft_dist.config.schema_data import LimitsConfig
    from sft_dist.data.prepare import prepare
    from sft_dist.train.pretrained import cache_root

    limits = LimitsConfig(
        max_dropped=1, max_answers_cut=1, min_end_of_turn_trained=0, max_unknown=1, max_eval_overlap=1
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"limits": limits})})
    try:
        return config, prepare(config, tokens.tokenizer, tokens.template, cache_root())
    except DataError:
        if config.data.on_bad_row == "drop":
            raise
    config = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_row": "drop"})})
    return config, prepare(config, tokens.tokenizer, tokens.template, cache_root())


def _padding(config: Config, prepared: Prepared) -> Ints | None:
    """How many tokens of padding each training row gets in the first epoch; None where rows are joined without any.

    None, too, for a plan that cannot be decided on this machine, and for an order of the rows that is not ours.
    """
    import numpy as np

    from sft_dist.parallel.machine import this_machine
    from sft_dist.parallel.resolve import resolve, with_rows
    from sft_dist.train.rows import EpochOrder, rows_of_whole_steps

    if config.data.packing or config.train.extra.get("train_sampling_strategy", "random") != "random":
        return None
    try:
        resolved = with_rows(resolve(config, this_machine()), this_machine(), prepared.ledger["train"])
    except SftDistError:
        return None
    if resolved.padding_free:
        return None
    rows = prepared.train.data.column("input_ids")
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in rows.chunks]).astype(np.int64)
    missing = -len(lengths) % rows_of_whole_steps(resolved)
    order = np.array(list(EpochOrder(len(lengths), missing, config.run.seed)))
    # A row that only fills the last step has one token.
    found = np.concatenate([lengths, np.ones(missing, dtype=np.int64)])
    batches = found[order].reshape(-1, resolved.per_device_train_batch_size)
    found[order] = (batches.max(axis=1, keepdims=True) - batches).ravel()
    return found[: len(lengths)]


def main(path: str) -> int:
    """Prepare the rows of a run's config; returns the exit status."""
    from sft_dist.config.loader import load_run_config
    from sft_dist.logs import log_to_stderr

    log_to_stderr()
    try:
        prepare_here(load_run_config(Path(path)))
    except SftDistError as error:
        sys.stdout.write(json.dumps({"message": error.message, "hint": error.hint, "kind": error.kind}) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
