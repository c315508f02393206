"""What it takes to train a run again: the command, the code, packages, model, rows and seed, as far as the run knows them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath

from sft_dist.report.config_text import config_value, flat_values
from sft_dist.report.facts import RunFacts
from sft_dist.report.html import MAX_CHARACTERS
from sft_dist.report.text import clip, mapping, number, plain

# Of one default beside a value.
MAX_DEFAULT = 60


def reproduction(facts: RunFacts) -> list[tuple[str, str]]:
    """Title and text of each thing that is needed; [] for a run without a config that can be read."""
    readable = bool(flat_values(facts.config_text))
    return [(title, clip(text, MAX_CHARACTERS)) for title, text in _parts(facts)] if readable else []


def _parts(facts: RunFacts) -> Iterator[tuple[str, str]]:
    text, env = facts.config_text, facts.env
    folder = PurePosixPath(_given(text, "run", "dir") or "runs") / facts.name
    yield (
        "Command",
        f"sft-dist train {shlex.quote(str(folder / 'config.yaml'))} {shlex.quote(f'run.name={facts.name}-again')}",
    )
    if env:
        yield "Code", _code(mapping(env.get("git")))
    versions = mapping(env.get("versions"))
    if versions:
        python = f"Python {plain(env['python'])}: " if "python" in env else ""
        yield "Packages", python + " ".join(f"{name}=={plain(number)}" for name, number in versions.items())
    if model := config_value(text, "model", "name"):
        revision = _given(text, "model", "revision")
        yield "Model", model + (f" at {revision}" if revision else "")
    if "key" in facts.ledger:
        counts = ((name, number(mapping(facts.ledger.get(name)).get("rows"))) for name in ("train", "eval"))
        rows = [f"{plain(int(count))} rows in {name}" for name, count in counts if count is not None]
        yield "Data", f"hash {plain(facts.ledger['key'])}" + (f": {', '.join(rows)}" if rows else "")
    if seed := config_value(text, "run", "seed"):
        yield "Seed", seed
    resolved = mapping(env.get("resolved"))
    if resolved:
        size = plain(resolved.get("world_size"))
        yield "Plan", f"{plain(resolved.get('plan'))} in {size} process(es), {plain(resolved.get('dtype'))}"


def _code(git: dict[str, object]) -> str:
    if not git.get("commit"):
        return "the packages below; the command was not typed in a git repository"
    changed = plain(git.get("changed_files"))
    extra = "" if changed in ("0", "-") else f", and {changed} changed file(s) that it does not have"
    return f"commit {plain(git['commit'])} of the repository that the command was typed in{extra}"


def _given(text: str, section: str, field: str) -> str | None:
    value = config_value(text, section, field)
    return None if value in (None, "", "null", "~") else value


def defaults() -> dict[str, str]:
    """The default of each field of a config by its dotted path, as one writes it."""
    from sft_dist.config.loader import fields
    from sft_dist.config.schema import Config

    found = {".".join(path): value for path, value in fields(Config())}
    return {
        path: "not set" if value is None else clip(json.dumps(value, ensure_ascii=False), MAX_DEFAULT)
        for path, value in found.items()
    }
