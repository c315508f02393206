"""YAML as configs use it: the scalars of YAML 1.2's core schema, no duplicate keys, errors with file and line.

PyYAML reads YAML 1.1, in which `1e-5` is text, `no` is false and `1:30:00` is the number 5400. Here `1e-5` is a number,
and `no` and `1:30:00` are the text that they look like. What `dump_yaml` writes means the same to both kinds of reader.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from sft_dist.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
# Section 10.3.2 of the YAML 1.2.2 specification. The merge key `<<` is older than 1.2, but files in the wild use it.
_SCALARS: tuple[tuple[str, str, str | None], ...] = (
    ("null", r"(?:~|null|Null|NULL|)", None),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
# PyYAML takes these for line breaks and folds them away, except as escapes in double quotes.
_ODD_BREAKS = re.compile("[\r\x85\u2028\u2029]")


def parse_yaml(text: str, source: str) -> Any:
    """The value of the one YAML document in `text`; None if it is empty. `source` names it in errors.

    Raises ConfigError with `source:line` for anything that is not YAML, and for duplicate or non-text keys.
    """
    value, problems = read_yaml(text, source)
    if problems:
        raise ConfigError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)
    return value


def read_yaml(text: str, source: str) -> tuple[Any, list[str]]:
    """Like `parse_yaml`, but a key that is a duplicate or no text becomes a line in the list and reading goes on."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: {_explain(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: the character {chr(error.character)!r} is not allowed in YAML") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be a config") from None
    return value, [f"{source}:{line}   {what}" for line, what in sorted(loader.key_problems)]


def dump_yaml(value: Any) -> str:
    """`value` (None, bool, int, float, str, lists, tuples and dicts of them) as block-style YAML text.

    `parse_yaml` reads the same value back, with lists for tuples; so does a YAML 1.1 reader.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "this is not YAML"
    if "'\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    if "mapping values are not allowed" in problem:
        return "a second ': ' on the line; put quotes around text that contains ': '"
    if "expected a single document" in (error.context or ""):
        return "a second document starts here; a config is one document"
    context = f" ({error.context})" if error.context else ""
    return f"{problem}{context}"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}
    yaml_constructors = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.key_problems: list[tuple[int, str]] = []


class _Dumper(yaml.SafeDumper):
    # Besides PyYAML's own resolvers: text is written plain only if it is text to YAML 1.1 and to 1.2.
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_null(loader: _Loader, node: yaml.ScalarNode) -> None:
    loader.construct_scalar(node)


def _construct_str(loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    text = str(loader.construct_scalar(node)).lower()
    if text not in ("true", "false"):
        raise _wrong_scalar(node, "true or false")
    return text == "true"


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text, base)
    except ValueError:
        raise _wrong_scalar(node, "a whole number") from None


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    try:
        return float(re.sub(r"\.(?=inf|nan)", "", text))
    except ValueError:
        raise _wrong_scalar(node, "a number") from None


def _construct_list(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _construct_dict(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "this is not a mapping", node.start_mark)
    kept: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    merges = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == f"{_TAG}merge":
            merges.append((key, value))
        elif key.tag != f"{_TAG}str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "this one"
            loader.key_problems.append((line, f"keys are text, and {shown} is not; put quotes around it"))
        else:
            if key.value in kept:
                first = kept[key.value][0].start_mark.line + 1
                loader.key_problems.append((line, f"duplicate key {key.value}, already set in line {first}"))
            kept[key.value] = (key, value)
    node.value = [*merges, *kept.values()]
    return loader.construct_mapping(node, deep=True)


def _construct_unknown(loader: _Loader, node: yaml.Node) -> None:
    tag = node.tag.replace(_TAG, "!!")
    raise yaml.constructor.ConstructorError(None, None, f"the tag {tag} has no place in a config", node.start_mark)


def _wrong_scalar(node: yaml.ScalarNode, wanted: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, f"{node.value[:40]!r} is not {wanted}", node.start_mark)


def _represent_str(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = '"' if _ODD_BREAKS.search(value) else "|" if "\n" in value else None
    return dumper.represent_scalar(f"{_TAG}str", value, style=style)


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"{_TAG}{_name}", re.compile(rf"{_pattern}\Z"), None if _first is None else list(_first)
        )
for _name, _construct in (
    ("null", _construct_null),
    ("bool", _construct_bool),
    ("int", _construct_int),
    ("float", _construct_float),
    ("str", _construct_str),
    ("merge", _construct_str),  # in any place but a key it is text
    ("seq", _construct_list),
    ("map", _construct_dict),
):
    _Loader.add_constructor(f"{_TAG}{_name}", _construct)
_Loader.add_constructor(None, _construct_unknown)
_Dumper.add_representer(str, _represent_str)
