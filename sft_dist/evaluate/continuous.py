"""Answers by transformers' continuous batching: a prompt takes the place of one that is answered, and nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.errors import SftDistError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So many batches' worth of prompts go in at once: what is answered is kept in between, for an evaluation that is killed.
BATCHES_AT_ONCE = 32


def answers_of(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], chosen: Any, seed: int | None, **limits: Any
) -> list[list[int]]:
    """The new tokens of each row of token ids, in their order; `chosen` is transformers' GenerationConfig.

    `limits` are fields of its ContinuousBatchingConfig, such as the size of the cache, which else takes what memory is free.
    Raises SftDistError if a row was not answered.
    """
    from transformers import ContinuousBatchingConfig

    # An option that it cannot obey would only be left out, with a line in the log.
    wanted = ContinuousBatchingConfig(seed=seed, drop_unsupported_processors=False, **limits)
    # It makes its tensors in this thread and writes to them in its own, for which inference mode is too strict.
    with torch.inference_mode(False), torch.no_grad():
        found = model.generate_batch(
            inputs=[list(row) for row in rows],
            generation_config=chosen,
            continuous_batching_config=wanted,
            progress_bar=False,
        )
    # They come as they end, under the names req_0, req_1, ... in the order in which they were asked.
    by_place = {int(str(name).rpartition("_")[2]): output for name, output in found.items()}
    missing = [place for place in range(len(rows)) if place not in by_place or by_place[place].error]
    if missing:
        why = next((str(by_place[place].error) for place in missing if place in by_place), "they did not come back")
        raise SftDistError(
            f"evaluate.generation.engine=continuous left {len(missing)} of {len(rows)} prompts without an answer: {why}",
            hint="sft-dist evaluate RUN evaluate.generation.engine=batches asks the rest",
        )
    return [list(by_place[place].generated_tokens) for place in range(len(rows))]
