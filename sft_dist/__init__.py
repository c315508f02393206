"""sft-dist: one supervised fine-tuning run, from a laptop's CPU to a multi-node SLURM job, from the same YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_dist.api import Assistant, ask, compare, fine_tune, load, load_config, preview

__version__ = "0.1.0"
__all__ = ["Assistant", "ask", "compare", "fine_tune", "load", "load_config", "preview"]


def __getattr__(name: str) -> Any:
    """What a notebook uses comes from sft_dist.api once it is asked for: commands start without it."""
    if name in __all__:
        from sft_dist import api

        return getattr(api, name)
    raise AttributeError(f"module 'sft_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
