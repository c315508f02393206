"""Change how a run that exists is submitted: its `slurm` section, and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence

from sft_dist.config.layers import override_layer
from sft_dist.config.problems import validate
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError


def with_slurm(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `slurm.field=VALUE` overrides; raises ConfigError for any other field."""
    if not overrides:
        return config
    problems: list[str] = []
    layer = override_layer(overrides, problems)
    others = sorted(set(layer.tree) - {"slurm"})
    problems += [f"{name}   cannot change: the run has been trained with another value" for name in others]
    tree = config.model_dump(mode="json")
    part = layer.tree.get("slurm")
    if isinstance(part, dict) and "profile" in part:
        problems.append("slurm.profile   is read when a run is made; name the fields that are to change")
    tree["slurm"] = {**tree["slurm"], **part} if isinstance(part, dict) else part
    changed, mistakes = validate(tree)
    problems += [mistake.line for mistake in mistakes]
    if problems or changed is None:
        raise ConfigError("a run that exists takes only fields of slurm", problems=problems)
    return changed
