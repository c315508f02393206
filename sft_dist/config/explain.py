"""What a config says about itself: each value with its origin and documentation, and the JSON Schema for editors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from sft_dist.config.loader import LoadedConfig, fields
from sft_dist.config.schema import SOURCES, Config
from sft_dist.config.sft_fields import known_sft_fields, refused_extra
from sft_dist.config.spelling import submodel


def explain(loaded: LoadedConfig) -> list[tuple[str, Any, str, str]]:
    """(dotted path, JSON value, origin, documentation) of every field, in the schema's order."""
    rows = []
    for path, value in fields(loaded.config):
        dotted = ".".join(path)
        rows.append((dotted, value, loaded.provenance[dotted], _documentation(path)))
    return rows


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of a config file as users write it: with `extends`, and text or a list for a data source."""
    schema = Config.model_json_schema()
    definitions, sections = schema["$defs"], schema["properties"]
    places = [(definitions[sections[section]["$ref"].rpartition("/")[2]], field) for section, field in SOURCES]
    for definition, field in [*places, (definitions["SetConfig"], "data")]:
        source = definition["properties"][field]
        kinds = source.pop("anyOf", None) or [{"$ref": source.pop("$ref")}]
        short = [("string", "path"), ("array", "sources")]
        source["anyOf"] = [*({"type": kind, "description": f"Short for `{name}`."} for kind, name in short), *kinds]
    for section_schema in sections.values():
        section_schema.pop("default", None)
    allowed = sorted(name for name in known_sft_fields() if refused_extra(name) is None)
    extra = definitions["TrainConfig"]["properties"]["extra"]
    extra.update(properties={name: {} for name in allowed}, additionalProperties=False)
    extends = {
        "description": "Files (relative to this one) or packaged recipes that this config adds to.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "sft-dist config",
        "properties": {"extends": extends, **sections},
    }


def _documentation(path: tuple[str, ...]) -> str:
    model: type[BaseModel] = Config
    text = ""
    for key in path:
        field = model.model_fields.get(key)
        if field is None:
            break
        text = field.description or ""
        child = submodel(field.annotation)
        if child is None:
            break
        model = child
    return "A field of TRL's SFTConfig." if path[:2] == ("train", "extra") and len(path) > 2 else text
