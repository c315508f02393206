"""The config as it stands in the run directory, with the lines marked that someone set."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sft_dist.report.text import flatten, mapping, plain

# The line breaks that YAML counts; str.splitlines knows more of them and would shift the marks.
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def marked_lines(
    text: str, provenance: dict[str, Any], defaults: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Each line of the YAML `text` with where its value came from; "" for a default, or where that is not known.

    The first line of a field that has one of `defaults` says it, too.
    """
    lines = _BREAK.split(text.rstrip())
    marks = [""] * len(lines)
    for path, start, end in _spans(text):
        source = provenance.get(path, "default")
        if isinstance(source, str) and source != "default":
            marks[start:end] = [source] * len(marks[start:end])
            if start < len(marks) and (default := _default(path, defaults or {})):
                marks[start] = f"{source} (default: {default})"
    return list(zip(lines, marks, strict=True))


def _default(path: str, defaults: Mapping[str, str]) -> str:
    """The default of a field, or of the section around it where the default is to have none; "" if there is neither."""
    if path in defaults:
        return defaults[path]
    parts = path.split(".")
    outer = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((f"{name} {defaults[name]}" for name in outer if name in defaults), "")


def config_value(text: str, section: str, field: str) -> str | None:
    """One value of the YAML `text` as it is written there; None if it is not there or the text is no YAML."""
    value = mapping(mapping(_tree(text)).get(section)).get(field)
    return value if isinstance(value, str) else None


def config_list(text: str, *path: str) -> list[str]:
    """The texts of a list in the YAML `text`; [] if it is not there or the text is no YAML."""
    value = _tree(text)
    for name in path:
        value = mapping(value).get(name)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def flat_values(text: str) -> dict[str, str]:
    """Every field of the YAML `text` by its dotted path, with its value as one line; {} if the text is no YAML."""
    return {field: plain(value) for field, value in flatten(mapping(_tree(text))).items()}


@functools.lru_cache(maxsize=1)
def _tree(text: str) -> Any:
    """The YAML `text` with all values as texts, None if it is no YAML. A report asks six times; nobody changes what comes back."""
    import yaml

    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return None


def _spans(text: str) -> list[tuple[str, int, int]]:
    """(dotted path, first line, line after the last) of every field of a YAML mapping, outer fields first."""
    import yaml

    def walk(node: Any, prefix: str, depth: int) -> Iterator[tuple[str, int, int]]:
        if not isinstance(node, yaml.MappingNode) or depth > 20:
            return
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            # A block ends where the next token starts, anything else on its own last line.
            block = not value.flow_style if isinstance(value, yaml.CollectionNode) else value.style in ("|", ">")
            start, end = key.start_mark.line, value.end_mark.line + (not block)
            yield path, start, max(end, start + 1)
            yield from walk(value, f"{path}.", depth + 1)

    try:
        return list(walk(yaml.compose(text, Loader=yaml.SafeLoader), "", 0))
    except (yaml.YAMLError, RecursionError):
        return []
