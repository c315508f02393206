"""The fields that say where rows come from and how they become tokens and labels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sft_dist.config.section import Count, Fraction, Positive, Section

DataFormat = Literal["auto", "messages", "sharegpt", "prompt_completion", "instruction", "question_answer", "text"]
LossOn = Literal["assistant", "last", "completion", "all"]
Role = Literal["system", "user", "assistant", "tool"]

_CHAT = ("system", "tools")
_MESSAGES = ("messages", "conversations", "role", "content", *_CHAT)
# What `fields` may give other names to: the columns that each format reads, and those by which answers are scored.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": _MESSAGES,
    "sharegpt": _MESSAGES,
    "prompt_completion": ("prompt", "completion", "role", "content", *_CHAT),
    "instruction": ("instruction", "input", "output", "response", "history", *_CHAT),
    "question_answer": ("question", "answer", *_CHAT),
    "text": ("text",),
}
SCORED_BY = ("expected", "category", "metric")


def foreign_columns(fields: Iterable[str], data_format: DataFormat) -> str | None:
    """What is wrong with the keys of `fields`: those that rows of `data_format` do not have; None if they have all."""
    formats = COLUMNS if data_format == "auto" else (data_format,)
    known = list(dict.fromkeys(column for name in formats for column in (*COLUMNS[name], *SCORED_BY)))
    wrong = [name for name in fields if name not in known]
    if not wrong:
        return None
    near = difflib.get_close_matches(wrong[0], known, n=1)
    rows = "no format has" if data_format == "auto" else f"the format {data_format} does not have"
    meant = f"did you mean {near[0]}?" if near else f"{{THEIR_NAME: YOUR_NAME}}; theirs: {', '.join(known)}"
    return f"{', '.join(wrong)}: {rows} such a column; {meant}"


class SourcePart(Section):
    """Where rows come from: files, a datasets name, or a synthetic task. A plain string is short for `path`."""

    path: str | None = None
    """A file (JSON, JSONL, CSV, Parquet or Arrow; .gz and .zst are unpacked), a folder of such files or one that datasets saved, a pattern such as `rows/*.jsonl`, or the name of a dataset on the Hub."""
    name: str | None = None
    """Configuration of a Hub dataset, as in `load_dataset(path, name)`."""
    split: str = "train"
    """Split of a Hub dataset, or of a folder that datasets saved with several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    task: Literal["tickets", "extraction", "mix"] | None = None
    """Generate rows instead: `tickets` (customer requests of six categories), `extraction` (name, e-mail and order number of a letter) or `mix` (arithmetic, fixed phrases, follow-up turns)."""
    language: Literal["en", "zh"] = "en"
    """Language of the tasks `tickets` and `extraction`."""
    answer: Literal["json", "fields"] = "json"
    """Form of the answers of `extraction`: JSON, or a line for each field."""
    rows: Count = 200
    """How many rows a synthetic task generates."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of a synthetic task."""
    format: DataFormat = "auto"
    """What a row looks like: `messages`, `sharegpt` (conversations), `prompt_completion`, `instruction` (instruction, input, output or response, history), `question_answer`, `text`; `auto` tells by the keys."""
    fields: dict[str, str] = {}
    """Names of the columns that the format knows by other names: `{prompt: frage, completion: antwort}`; `role` and `content` are the keys inside a message."""
    roles: dict[str, Role] = {}
    """What the rows call the roles of a conversation: `{client: user, agent: assistant}`."""
    sample: Count | None = None
    """Use only the first so many rows."""
    weight: Positive = 1.0
    """How often each row is taken: 2 takes every row twice, 0.5 every second one. Copies are held out together, once."""

    @field_validator("fields")
    @classmethod
    def _columns_of_the_format(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        # A format that is wrong itself is not there, and has its own message.
        wrong = foreign_columns(value, info.data.get("format", "auto"))
        if wrong:
            raise ValueError(wrong)
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> SourcePart:
        if (self.path is None) == (self.task is None) and not getattr(self, "sources", ()):
            raise ValueError("set exactly one of path (a file or a dataset name) and task (a synthetic task)")
        return self


class SourceConfig(SourcePart):
    """Where rows come from: files, a datasets name, a synthetic task, or several of these. A plain string is short for `path`, a list for `sources`."""

    sources: tuple[SourcePart, ...] = ()
    """Several of them, one after the other."""

    @model_validator(mode="after")
    def _no_other_origin(self) -> SourceConfig:
        if self.sources and (self.path, self.task) != (None, None):
            raise ValueError("set path or task inside of sources, where there are several")
        return self

    @property
    def parts(self) -> tuple[SourcePart, ...]:
        """The sources one by one: those in `sources`, or this one."""
        return self.sources or (self,)


class LimitsConfig(Section):
    """Shares of the training rows, and of the rows of `eval`, at which preparing them fails, before a GPU is used; judged from 20 rows on."""

    max_dropped: Fraction = 0.5
    """Rows that cannot be used (with `on_bad_row: drop`)."""
    max_answers_cut: Fraction = 0.5
    """Rows whose answer, or its end, is beyond `max_length`."""
    min_end_of_turn_trained: Fraction = 0.5
    """Answers of which the token that ends them is trained."""
    max_unknown: Fraction = 0.1
    """Tokens that the vocabulary does not know."""
    max_duplicates: Fraction = 1.0
    """Training rows that stand there more than once, without the copies that `weight` makes; 1 allows any."""
    max_eval_overlap: Fraction = 0.5
    """Held-out rows that also stand in the training rows; any are warned of, 1 allows all."""


class DataConfig(Section):
    """Training rows and how they become tokens and labels."""

    train: SourceConfig = SourceConfig(task="tickets")
    """The training rows."""
    eval: SourceConfig | None = None
    """Rows for the evaluation loss during training."""
    eval_size: Annotated[float, Field(ge=0.0)] = 0.0
    """Without `eval`: rows held out of `train`, as a share (below 1) or a number (1 and above)."""
    system: str | None = None
    """System message put before every conversation that has none."""
    max_length: Count = 1024
    """Longest row in tokens; what is beyond is cut and counted in the ledger."""
    assistant_only_loss: bool = True
    """Train on the assistant's words and end-of-turn tokens only; false is short for `loss_on: all`."""
    loss_on: LossOn = "assistant"
    """Tokens that are trained: those of the `assistant` in every turn, in its `last` one, the whole `completion` (all that follows the prompt, as TRL's completion_only_loss), or `all`."""
    packing: bool = False
    """Put several documents into each training row of at most `max_length` tokens, each blind to the others: hardly any room is left. `train.global_batch_size` then counts such rows."""
    packing_overflow: Literal["truncate", "split"] = "truncate"
    """With `packing`, of a document longer than `max_length`: cut off what is beyond, or make more documents of it."""
    on_bad_row: Literal["error", "drop"] = "error"
    """Stop at a row that cannot be used, or leave it out and count it."""
    limits: LimitsConfig = LimitsConfig()
    """When numbers in the ledger fail the run."""

    @property
    def trained(self) -> LossOn:
        """`loss_on`, with what `assistant_only_loss` says."""
        return self.loss_on if self.assistant_only_loss else "all"


class SetConfig(Section):
    """Rows that both models answer, and how the answers are scored."""

    name: str
    """What the scores are called."""
    data: SourceConfig
    """The rows; the last assistant message, or the column `expected`, is the expected answer."""
    metrics: tuple[str, ...] = ("exact",)
    """The first is the one that changes are sorted by: `exact`, `contains`, `numeric`, `json`, `fields`, `label`, `rouge`, `chrf`, `bleu`, `perplexity`, or a function of yours as `module:function` (docs/evaluate.md)."""
    labels: tuple[str, ...] = ()
    """The possible answers, for `label`: each row's are ranked by length-normalised likelihood."""
    system: str | None = None
    """System message of the rows that have none; `evaluate.system` if not set."""
    category_field: str = "category"
    """Column by which scores are broken down, if the rows have it."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens; `evaluate.generation.max_new_tokens` if not set."""
