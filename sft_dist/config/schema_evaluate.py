"""The fields that say what a model is asked, and how its answers are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sft_dist.config.schema_data import SetConfig, SourceConfig
from sft_dist.config.section import Auto, Count, Positive, Section


class GenerationConfig(Section):
    """How answers are generated; names and meanings are those of transformers' GenerationConfig."""

    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    batch_size: Count | Auto = "auto"
    """Prompts at once; `auto` is 16, and 64 where a GPU generates answers. Half as many, and half of those, where memory does not suffice."""
    engine: Literal["batches", "continuous"] = "batches"
    """`continuous` is transformers' continuous batching, on GPUs only; answers may differ in rounding."""
    do_sample: bool = False
    """Sample instead of taking the likeliest token."""
    temperature: Positive = 1.0
    """Temperature of sampling."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of sampling."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Likeliest tokens to sample from; 0 is all."""
    repetition_penalty: Positive = 1.0
    """Above 1 makes repeated tokens less likely."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No n-gram of this size twice in an answer; 0 allows it."""
    enable_thinking: bool | None = None
    """Passed to templates that know it (Qwen3); not set leaves the template's default."""


class DuringConfig(Section):
    """What the model is asked while it trains; the steps wait for it."""

    steps: Count
    """Ask after every so many steps."""
    seconds: Annotated[float, Field(gt=0.0, le=180.0)] = 60.0
    """The training waits no longer for answers each time, shared out among the sets; what is not answered by then does not count."""
    rows: Count = 16
    """Rows of each set, the first ones."""


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness that both models are scored on (the extra `harness`)."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks or groups, as `lm-eval ls tasks` lists them."""
    include_path: str | None = None
    """Folder with task files of yours."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; each task's own number if not set."""
    limit: Count | None = None
    """The first so many rows of each task only."""
    apply_chat_template: bool = False
    """Ask through the chat template."""
    batch_size: Count = 16
    """Requests at once."""


class EvaluateConfig(Section):
    """What the model is asked before and after training, and how the answers are scored."""

    before: bool = True
    """Ask and score the base model before training."""
    after: bool = True
    """Ask and score the tuned model after training."""
    questions: tuple[str, ...] = ()
    """Asked of both models; the answers stand side by side in the report."""
    system: str | None = None
    """System message of the questions; `data.system` if not set."""
    data: SourceConfig | None = None
    """Held-out rows to score; the last assistant message is the expected answer."""
    labels: tuple[str, ...] = ()
    """The possible answers of a classification: each row's are ranked by length-normalised likelihood."""
    category_field: str = "category"
    """Column of the rows of `data` by which scores are broken down, if they have it."""
    sets: tuple[SetConfig, ...] = ()
    """More held-out rows, each with metrics of its own."""
    harness: HarnessConfig | None = None
    """Tasks of lm-evaluation-harness, scored beside the sets."""
    generation: GenerationConfig = GenerationConfig()
    """How answers are generated."""
    during: DuringConfig | None = None
    """Ask during the training, too; the scores stand beside the losses. Not set asks before and after only."""

    @property
    def all_sets(self) -> tuple[SetConfig, ...]:
        """What is scored: `data`, as a set of that name, and the sets."""
        if self.data is None:
            return self.sets
        metrics = ("exact", "label") if self.labels else ("exact",)
        scored = SetConfig(
            name="data", data=self.data, metrics=metrics, labels=self.labels, category_field=self.category_field
        )
        return (scored, *self.sets)
