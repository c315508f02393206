"""Write every generated file of a checkout: `python -m sft_dist.refs` (or `make refs`). `--light` leaves trl alone."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_dist.config.explain import json_schema
from sft_dist.config.profile_example import profile_file
from sft_dist.config.sft_fields import known_sft_fields, sft_config_fields
from sft_dist.files import write_text
from sft_dist.jobs.examples import example_files
from sft_dist.parallel.launch_files import launch_files
from sft_dist.parallel.plans_page import plans_page
from sft_dist.parallel.projection import scaling_page
from sft_dist.parallel.table import planner_table

log = logging.getLogger(__name__)

Node = Mapping[str, Any]

REFERENCE_HEAD = """\
# Config reference

Every field that a config may set. This file is generated from the schema (`make refs`): change a text there.

- A config is a YAML file with these sections. What it does not set has the default.
- `extends: NAME` puts a config on top of other files (relative to this one) or packaged recipes.
- On the command line a field is `section.field=VALUE`, for example `train.learning_rate=1e-5`; `=null` unsets it.
- `sft-dist config CONFIG --explain` shows each value with where it came from. An editor that knows JSON Schema completes
  and checks fields with the output of `sft-dist schema`, which is also [sft-dist.schema.json](sft-dist.schema.json).
"""
BOUNDS = {
    "minimum": "{} or more",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
PLAIN = {"boolean": "`true` or `false`", "string": "text", "object": "mapping"}


def light_files() -> dict[str, str]:
    """Path from the checkout's root -> text, of each generated file that needs no heavy import."""
    schema = json_schema()
    return {
        "docs/config.md": config_reference(schema),
        "docs/sft-dist.schema.json": json.dumps(schema, indent=2) + "\n",
        "docs/planner.md": planner_table(),
        "docs/plans.md": plans_page(),
        "docs/scaling.md": scaling_page(),
        **launch_files(),
        **example_files(),
        "slurm/profile.yaml": profile_file(),
    }


def heavy_files() -> dict[str, str]:
    """The same, of each generated file that comes from an installed library; imports trl, which takes seconds."""
    return {"sft_dist/resources/sft_config_fields.json": json.dumps(sft_config_fields(), indent=2) + "\n"}


def config_reference(schema: Node) -> str:
    """docs/config.md: a table of fields for each section of the config's JSON Schema, then those that sections share."""
    definitions = schema["$defs"]
    sections = {name: _referenced(part)[0] for name, part in schema["properties"].items() if _referenced(part)}
    nested: dict[str, list[str]] = {}
    for section, definition in sections.items():
        for field, node in definitions[definition]["properties"].items():
            for name in _referenced(node) or _referenced(node.get("items", {})):
                nested.setdefault(name, []).append(f"{section}.{field}")
    parts = [REFERENCE_HEAD]
    for section, definition in sections.items():
        parts += [f"## {section}", definitions[definition]["description"], _table(definitions, definition, section)]
    for name, places in nested.items():
        prefix = places[0] if len(places) == 1 else ""
        where = f"The fields of {_listed([f'`{place}`' for place in places], 'and')}."
        parts += [f"## {_title(name)}", definitions[name]["description"], where, _table(definitions, name, prefix)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def type_in_words(node: Node) -> str:
    """What a field of this JSON Schema takes: "whole number, 1 or more; or `auto`". ValueError for an unknown kind."""
    if "anyOf" in node:
        # That a field may stay unset is said in the column of defaults.
        return "; or ".join(type_in_words(kind) for kind in node["anyOf"] if kind.get("type") != "null")
    if "enum" in node:
        return _listed([f"`{value}`" for value in node["enum"]], "or")
    if "const" in node:
        return f"`{node['const']}`"
    if "$ref" in node:
        title = _title(_referenced(node)[0])
        return f"mapping, see [{title}](#{title.lower().replace(' ', '-')})"
    kind = node.get("type")
    if kind == "array":
        return f"list of {type_in_words(node['items'])}" if "items" in node else "list"
    if kind in ("integer", "number"):
        bounds = [words.format(f"{node[key]:.12g}") for key, words in BOUNDS.items() if key in node]
        return ", ".join(["whole number" if kind == "integer" else "number", *bounds])
    if kind not in PLAIN:
        raise ValueError(f"no plain words for the JSON Schema {dict(node)}")
    return PLAIN[kind]


def write_files(root: Path, files: Mapping[str, str]) -> None:
    """Write each file below `root` and log whether it changed."""
    for name, text in files.items():
        path = root / name
        changed = not path.is_file() or path.read_bytes() != text.encode()
        if changed:
            write_text(path, text)
        log.info("%s  %s", "wrote    " if changed else "unchanged", name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the generated files of the checkout that this module stands in; outside of one, exit with a message."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.refs", description="Write the generated files again.")
    parser.add_argument("--light", action="store_true", help="leave out what needs trl, which takes seconds to import")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        sys.exit(f"{root} is no checkout of sft-dist, so there is nothing to write")
    if not options.light:
        write_files(root, heavy_files())
        # The JSON Schema lists these names, and has to list the new ones.
        known_sft_fields.cache_clear()
    write_files(root, light_files())


def _table(definitions: Node, name: str, prefix: str) -> str:
    rows = [["field", "type", "default", "meaning"], ["---"] * 4]
    for field, node in definitions[name]["properties"].items():
        path = f"{prefix}.{field}" if prefix else field
        rows.append([f"`{path}`", type_in_words(node), _default(node, definitions), node["description"]])
    # A bar ends the cell, also inside of backticks.
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _default(node: Node, definitions: Node) -> str:
    default = node.get("default")
    if default is None:
        return "not set"
    for name in _referenced(node):
        # Of a section, only what differs from its own fields' defaults is news.
        own = definitions[name]["properties"]
        changed = [f"{key}: {value}" for key, value in default.items() if value != own[key].get("default")]
        return f"`{{{', '.join(changed)}}}`" if changed else "its own defaults"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _referenced(node: Node) -> list[str]:
    """Names of the definitions that a schema refers to, itself or as one of its kinds."""
    return [kind["$ref"].rpartition("/")[2] for kind in (node, *node.get("anyOf", ())) if "$ref" in kind]


def _title(definition: str) -> str:
    return definition.removesuffix("Config").removesuffix("Part")


def _listed(items: Sequence[str], word: str) -> str:
    return f"{', '.join(items[:-1])} {word} {items[-1]}" if len(items) > 1 else items[0]


if __name__ == "__main__":
    main()
