"""Whether the decoder layers of a run are compiled (train.compile_layers)."""

from __future__ import annotations

from sft_dist.config.schema import Config

VARLEN = "sft_dist_varlen"
# Compiling takes about half a minute and halves the time of a step: shorter runs are over before it pays.
COMPILE_FROM_STEPS = 100


def compiled_by_default(max_steps: int | None) -> bool:
    """What `auto` means on a GPU with our attention, for a run of so many steps (None: as many as the rows make)."""
    return max_steps is None or max_steps >= COMPILE_FROM_STEPS


def counted_as_compiled(config: Config, dtype: str) -> bool:
    """Whether the planner counts compiled layers for `config` on GPUs; it takes `auto` attention for ours."""
    if config.train.compile_layers != "auto":
        return config.train.compile_layers
    ours = dtype == "bfloat16" and config.model.attn_implementation in ("auto", VARLEN)
    return ours and compiled_by_default(config.train.max_steps)
