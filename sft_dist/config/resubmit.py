"""Change what a run that exists may still change: how it is submitted, and what its models are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_dist.config.layers import override_layer
from sft_dist.config.problems import validate
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError


def with_slurm(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with overrides of fields of `slurm` and `container`; raises ConfigError for any other field."""
    if not overrides:
        return config
    problems: list[str] = []
    layer = override_layer(overrides, problems)
    others = sorted(set(layer.tree) - {"slurm", "container"})
    problems += [f"{name}   cannot change: the run has been trained with another value" for name in others]
    tree = config.model_dump(mode="json")
    part = layer.tree.get("slurm")
    if isinstance(part, dict) and "profile" in part:
        problems.append("slurm.profile   is read when a run is made; name the fields that are to change")
    for section in layer.tree.keys() & {"slurm", "container"}:
        _nest(tree, {section: layer.tree[section]})
    changed, mistakes = validate(tree)
    problems += [mistake.line for mistake in mistakes]
    if problems or changed is None:
        raise ConfigError("a run that exists takes only fields of slurm and container", problems=problems)
    return changed


def with_evaluate(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with overrides of fields of `evaluate`; raises ConfigError for any other field."""
    if not overrides:
        return config
    problems: list[str] = []
    layer = override_layer(overrides, problems)
    others = sorted(set(layer.tree) - {"evaluate"})
    problems += [f"{name}   cannot change: the run was made with another value" for name in others]
    tree = config.model_dump(mode="json")
    fields = layer.tree.get("evaluate", {})
    if isinstance(fields, dict):
        source = fields.get("data")
        if isinstance(source, dict) and source.keys() & {"path", "task", "sources"}:
            tree["evaluate"]["data"] = None  # of another source nothing is kept
        _nest(tree["evaluate"], fields)
    else:
        tree["evaluate"] = fields
    changed, mistakes = validate(tree)
    # What has changed around the run since, a file that is gone, is no matter here.
    ours = [mistake.line for mistake in mistakes if mistake.path.startswith("evaluate")]
    if mistakes and not ours:
        changed, mistakes = validate(tree, rules=False)
        ours = [mistake.line for mistake in mistakes]
    problems += ours
    if problems or changed is None:
        raise ConfigError("the model of a run takes only fields of evaluate", problems=problems)
    return changed


def _nest(tree: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _nest(tree[name], value)
        else:
            tree[name] = value
