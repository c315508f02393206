"""Load a config: a file or a packaged recipe, what it extends, then the overrides; every value knows where it is from.

    defaults  <  the profile that slurm.profile names  <  extended files and recipes, in their order  <  the file or recipe itself  <  overrides

A later layer's mappings are merged into the earlier ones, its lists and plain values replace theirs. A data source has
one origin: setting its `path` drops an earlier `task` and the reverse, and a source given as plain text replaces the
earlier one whole. Relative paths: see `layers._locate_files`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.layers import Layer, document_layers, list_recipes, open_document, override_layer, read_recipe
from sft_dist.config.problems import validate
from sft_dist.config.profile import profile_layer
from sft_dist.config.schema import SOURCES, Config
from sft_dist.config.spelling import Problem
from sft_dist.config.yaml12 import dump_yaml, parse_yaml
from sft_dist.errors import ConfigError

__all__ = ["LoadedConfig", "list_recipes", "load_config", "load_run_config", "read_recipe", "write_config"]

FieldPath = tuple[str, ...]

# Fields of a data source that mean nothing once the source is of the other kind.
_OF_TASK = ("task", "rows", "seed", "language", "answer")
_OF_PATH = ("path", "name", "split", "revision", "format", "fields", "roles")
_OF_MANY = ("sources",)
_FOREIGN = {"path": _OF_TASK + _OF_MANY, "task": _OF_PATH + _OF_MANY, "sources": _OF_PATH + _OF_TASK}


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, the origin of each of its fields, and the file that it is from (None for a recipe).

    `provenance` maps each dotted field path to "default", "file PATH", "recipe NAME", "cli", or, for a run.name that
    nobody set, "name of the file" or "name of the recipe".
    """

    config: Config
    provenance: dict[str, str]
    path: Path | None


def load_config(source: str | os.PathLike[str], overrides: str | Sequence[str] = ()) -> LoadedConfig:
    """The config in the file `source`, or in the packaged recipe of that name, with `a.b=VALUE` overrides (or one) applied.

    Raises ConfigError whose `problems` hold one line for each mistake in the files and the overrides together.
    """
    problems: list[str] = []
    source = os.fspath(source)
    cli = override_layer([overrides] if isinstance(overrides, str) else overrides, problems)
    try:
        document = open_document(source)
        layers = document_layers(document, problems)
    except ConfigError as error:
        if not problems:
            raise
        raise _refuse(source, [error.message, *problems], hint=error.hint) from error
    profile = profile_layer([*layers, cli], problems)
    tree, origins = _merge([*_default_sources(), *([profile] if profile else []), *layers, cli])
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = document.run_name
        origins["run", "name"] = f"name of the {'recipe' if document.path is None else 'file'}"
    config, mistakes = validate(tree)
    problems += [_with_origin(mistake, origins, document.origin) for mistake in mistakes]
    if config is None or problems:
        raise _refuse(document.name, problems)
    provenance = {".".join(path): _origin(path, origins) for path, _ in fields(config)}
    return LoadedConfig(config, provenance, document.path)


def load_run_config(path: Path) -> Config:
    """The config that a run directory (or its config.yaml, given as `path`) records; raises ConfigError as above."""
    file = path / "config.yaml" if path.is_dir() else path
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds no config")
    config, mistakes = validate(tree, rules=False)
    if config is None:
        raise _refuse(str(file), [mistake.line for mistake in mistakes])
    return config


def write_config(config: Config) -> str:
    """The whole of `config` as YAML text that `load_run_config` reads back to an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))


def fields(config: Config) -> Iterator[tuple[FieldPath, Any]]:
    """Path and JSON value of every leaf: fields that are no section, and single keys of `train.extra` and below."""
    return _leaves(config.model_dump(mode="json"), ())


def _leaves(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _default_sources() -> Iterator[Layer]:
    """The schema's default sources, spelled out so that `data.train.rows=10` adds to one instead of replacing it."""
    default = Config().model_dump(mode="json")
    for section, field in SOURCES:
        source = default[section][field]
        if source is not None:
            origin = {key: source[key] for key in ("path", "task", "sources") if source[key]}
            yield Layer("default", {section: {field: origin}})


def _merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[FieldPath, str]]:
    tree: dict[str, Any] = {}
    origins: dict[FieldPath, str] = {}
    for layer in layers:
        _drop_replaced_sources(tree, origins, layer)
        _merge_into(tree, layer.tree, (), layer.origin, origins)
    return tree, origins


def _merge_into(
    tree: dict[str, Any], added: Mapping[str, Any], path: FieldPath, origin: str, origins: dict[FieldPath, str]
) -> None:
    for key, value in added.items():
        here = (*path, key)
        if isinstance(value, dict):
            if not isinstance(tree.get(key), dict):
                _forget(tree, key, here, origins)
                tree[key] = {}
            _merge_into(tree[key], value, here, origin, origins)
        else:
            _forget(tree, key, here, origins)
            tree[key] = value
            origins[here] = origin


def _drop_replaced_sources(tree: dict[str, Any], origins: dict[FieldPath, str], layer: Layer) -> None:
    for section, field in SOURCES:
        old, new = _source(tree, section, field), _source(layer.tree, section, field)
        kinds = [kind for kind in ("path", "task", "sources") if new.get(kind)]
        dropped: Sequence[str] = ()
        if (section, field) in layer.whole_sources:
            dropped = list(old)
        elif len(kinds) == 1:
            dropped = _FOREIGN[kinds[0]]
        for key in dropped:
            _forget(old, key, (section, field, key), origins)


def _source(tree: Mapping[str, Any], section: str, field: str) -> dict[str, Any]:
    part = tree.get(section)
    source = part.get(field) if isinstance(part, dict) else None
    return source if isinstance(source, dict) else {}


def _forget(part: dict[str, Any], key: str, path: FieldPath, origins: dict[FieldPath, str]) -> None:
    part.pop(key, None)
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]


def _origin(path: FieldPath, origins: Mapping[FieldPath, str]) -> str:
    """Who set `path`, or something below it; "default" if nobody did."""
    if path in origins:
        return origins[path]
    return next((origin for known, origin in origins.items() if known[: len(path)] == path), "default")


def _with_origin(problem: Problem, origins: Mapping[FieldPath, str], main: str) -> str:
    path = tuple(problem.path.partition("[")[0].split("."))
    origin = _origin(path, origins)
    inherited = origin.startswith(("file ", "recipe ")) and origin != main
    return f"{problem.line} (in {origin})" if inherited else problem.line


def _refuse(source: str, problems: Sequence[str], hint: str | None = None) -> ConfigError:
    return ConfigError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems, hint=hint)
