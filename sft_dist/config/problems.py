"""From a tree of plain values to a Config, or to one readable line for each mistake in it."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from sft_dist.config.rules import rule_problems
from sft_dist.config.schema import Config, SetConfig, SourcePart
from sft_dist.config.spelling import Problem, did_you_mean, shown, submodel, suggest

Path = tuple[str, ...]

# What a value should have been, by pydantic's error type; `{}` is filled from the error's context.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a section (key: value)",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
}


def validate(tree: Mapping[str, Any], *, rules: bool = True) -> tuple[Config | None, list[Problem]]:
    """The Config that `tree` describes, or None and every mistake in it.

    Mistakes are taken out of a copy and the rest is validated again, so that a wrong type does not hide a contradiction
    between other fields; what follows from a mistake already listed is not listed again. `rules` is whether fields are checked against each other.
    """
    rest = copy.deepcopy(dict(tree))
    problems = list(_not_json(rest))
    wrong: set[Path] = set()
    for problem in problems:
        path = tuple(problem.path.split("."))
        wrong.add(path)
        _remove(rest, path)
    config = None
    while config is None:
        try:
            config = Config.model_validate_json(json.dumps(rest), strict=True)
        except ValidationError as error:
            for path, errors in _by_field(error).items():
                if not any(known[: len(path)] == path for known in wrong):
                    problem, meant = _describe(path, errors)
                    problems.append(problem)
                    wrong.update(meant)
                wrong.add(path)
                _remove(rest, path)
    for problem in rule_problems(config) if rules else ():
        fields = [tuple(name.split(".")) for name in (problem.path, *problem.rests_on)]
        if not any(_overlap(field, known) for field in fields for known in wrong):
            problems.append(problem)
    return (None if problems else config), problems


def _by_field(error: ValidationError) -> dict[Path, list[Any]]:
    """Errors by field: pydantic reports each member of a union and each item of a list on its own."""
    grouped: dict[Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        model: type[BaseModel] | None = Config
        path: list[str] = []
        for part in item["loc"]:
            if model is None:
                break
            path.append(str(part))
            field = model.model_fields.get(str(part))
            model = submodel(field.annotation) if field else None
        if not path:
            raise ValueError(f"the config cannot be written as JSON: {item['msg']}")
        grouped.setdefault(tuple(path), []).append(item)
    return grouped


def _describe(path: Path, errors: list[Any]) -> tuple[Problem, list[Path]]:
    """The problem, and the fields that the user may have meant by an unknown key."""
    dotted, first = ".".join(path), errors[0]
    if path[-1] == "sets" and len(first["loc"]) > len(path) + 1:
        return _describe_set(dotted, first, first["loc"][len(path) :]), []
    if first["type"] == "extra_forbidden" and first["loc"][len(path) - 1] in path and len(first["loc"]) > len(path):
        item, key = first["loc"][len(path)], str(first["loc"][-1])
        near = did_you_mean(key, SourcePart.model_fields)
        return Problem(f"{dotted}[{item}].{key}", f"unknown key{near}"), []
    if first["type"] == "extra_forbidden":
        text, meant = suggest(path)
        return Problem(dotted, f"unknown key; {text}"), [tuple(field.split(".")) for field in meant]
    if first["type"] == "value_error":
        rest = first["loc"][len(path) :]
        return Problem(
            _place(dotted, rest) if rest and isinstance(rest[0], int) else dotted, str(first["ctx"]["error"])
        ), []
    index = next((part for part in first["loc"] if isinstance(part, int)), None)
    where = dotted if index is None else f"{dotted}[{index}]"
    same = [error for error in errors if index is None or index in error["loc"]]
    choices = [choice for error in same for choice in _choices(error)]
    wanted = [_expected(error) for error in same if error["type"] != "literal_error"]
    if choices:
        wanted.append(f"{'one of ' if len(choices) > 1 else ''}{', '.join(choices)}")
    value = first["input"]
    text = f"{shown(value)} is not {', or '.join(wanted)}"
    if isinstance(value, str) and choices:
        text += did_you_mean(value, choices)
    if first["type"] == "string_type" and isinstance(value, bool | int | float | dict):
        text += "; put quotes around it"
    if first["type"] == "tuple_type" and isinstance(value, str):
        text += f"; write [{json.dumps(value, ensure_ascii=False)}]"
    return Problem(where, text), []


def _describe_set(dotted: str, error: Any, rest: tuple[int | str, ...]) -> Problem:
    """The problem at `rest` inside of a list of evaluation sets."""
    where = _place(dotted, rest)
    if error["type"] == "missing":
        return Problem(where, "is not set")
    if error["type"] == "extra_forbidden":
        known = SetConfig.model_fields if len(rest) == 2 else SourcePart.model_fields
        valid = f"; valid: {', '.join(known)}"
        return Problem(where, f"unknown key{did_you_mean(str(rest[-1]), known) or valid}")
    if error["type"] == "value_error":
        return Problem(where, str(error["ctx"]["error"]))
    wanted = " or ".join(_choices(error)) or _expected(error)
    return Problem(where, f"{shown(error['input'])} is not {wanted}")


def _place(dotted: str, rest: tuple[int | str, ...]) -> str:
    return dotted + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)


def _expected(error: Any) -> str:
    phrase = _EXPECTED.get(error["type"])
    return phrase.format(**error.get("ctx", {})) if phrase else f"accepted: {error['msg']}"


def _choices(error: Any) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"]) if error["type"] == "literal_error" else []


def _not_json(value: Any, path: Path = ()) -> Iterator[Problem]:
    """Values that YAML has and JSON does not: infinite numbers, and halves of surrogate pairs."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_json(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from _not_json(item, path)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(".".join(path), f"{value} is not a finite number")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            yield Problem(".".join(path), f"{value!a} is not Unicode text")


def _remove(tree: dict[str, Any], path: Path) -> None:
    part: Any = tree
    for key in path[:-1]:
        part = part.get(key, {})
    part.pop(path[-1], None)


def _overlap(one: Path, other: Path) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]
