"""The layers that a config is made of: packaged recipes, files with what they extend, and command-line overrides."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sft_dist.config.schema import SOURCES, expand_sources, given_sources
from sft_dist.config.spelling import did_you_mean, shown
from sft_dist.config.yaml12 import parse_yaml, read_yaml
from sft_dist.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """One file, recipe or command line: what it sets, and where that came from, as provenance shows it."""

    origin: str
    tree: dict[str, Any]
    whole_sources: tuple[tuple[str, str], ...] = ()
    """Data sources given as plain text or as a list, which replace what an earlier layer says about them instead of adding to it."""


@dataclass(frozen=True)
class Document:
    """A config file (`path` is set) or a packaged recipe, unparsed."""

    name: str
    text: str
    path: Path | None

    @property
    def origin(self) -> str:
        return f"recipe {self.name}" if self.path is None else f"file {self.name}"

    @property
    def run_name(self) -> str:
        """A folder name made from the file's or the recipe's name."""
        stem = self.name if self.path is None else self.path.stem
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:120] or "run"


def list_recipes() -> dict[str, str]:
    """The packaged recipes by name, each with its first comment line."""
    return {name: _first_comment(entry.read_text("utf-8")) for name, entry in _recipes().items()}


def read_recipe(name: str) -> str:
    """The text of a packaged recipe; ConfigError lists those there are if it is none of them."""
    recipes = _recipes()
    if name not in recipes:
        guess = did_you_mean(name, recipes)
        raise ConfigError(f"there is no recipe {name!r}{guess}", hint=f"recipes: {', '.join(recipes) or 'none'}")
    return recipes[name].read_text("utf-8")


def open_document(source: str) -> Document:
    """The config file at the path `source`, or the recipe of that name; ConfigError if there is neither."""
    document = _find(source, Path())
    if document is not None:
        return document
    recipes = _recipes()
    guess = did_you_mean(source, recipes)
    hint = f"recipes: {', '.join(recipes) or 'none'}; `sft-dist init` writes a config to start from"
    if (Path(source) / "config.yaml").is_file():
        hint = f"{source} is a run directory; its config is {Path(source) / 'config.yaml'}"
    raise ConfigError(f"there is no config file {source!r} and no recipe of that name{guess}", hint=hint)


def document_layers(document: Document, problems: list[str], chain: Sequence[Document] = ()) -> list[Layer]:
    """What `document` extends, farthest first, then itself. Lines about duplicate keys are added to `problems`.

    Raises ConfigError for what cannot be read on from: no YAML, no mapping, a missing parent, a cycle.
    """
    if any(_same(document, earlier) for earlier in chain):
        names = " -> ".join(each.name for each in [*chain, document])
        raise ConfigError(f"{document.name} extends itself: {names}", hint="take one `extends` out")
    tree, key_problems = read_yaml(document.text, document.name)
    problems += key_problems
    if tree is None:
        raise ConfigError(f"{document.name} is empty", hint="`sft-dist init` writes a config to start from")
    if not isinstance(tree, dict):
        raise ConfigError(f"{document.name} holds {shown(tree)}, not sections like `train:` with fields below them")
    layers: list[Layer] = []
    for reference in _references(document, tree.pop("extends", []), problems):
        parent = _find(reference, document.path.parent if document.path else None)
        if parent is None:
            raise ConfigError(
                f"{document.name} extends {reference!r}, which is neither a file beside it nor a recipe"
                f"{did_you_mean(reference, _recipes())}"
            )
        layers += document_layers(parent, problems, [*chain, document])
    layer = _layer(document.origin, tree)
    if document.path is not None:
        _locate_files(layer.tree, document.path.parent)
    return [*layers, layer]


def override_layer(overrides: Sequence[str], problems: list[str]) -> Layer:
    """The overrides `a.b=VALUE` as one layer, later ones over earlier ones; lines about mistakes go to `problems`."""
    parsed: list[tuple[list[str], Any]] = []
    for override in overrides:
        try:
            parsed.append(_parse_override(override))
        except ConfigError as error:
            problems.append(error.message)
    tree: dict[str, Any] = {}
    whole: list[tuple[str, str]] = []
    for path, value in parsed:
        for key in reversed(path):
            value = {key: value}
        layer = _layer("cli", value)
        whole += layer.whole_sources
        _nest(tree, layer.tree)
    _locate_files(tree, Path())
    return Layer("cli", tree, tuple(whole))


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    plain = key.lstrip("-").strip()
    if key.startswith("-"):
        example = f"{plain}={text}" if text else f"{plain}=VALUE"
        raise ConfigError(f"{override}   config fields take no dashes; write {example}")
    if not equals:
        raise ConfigError(f"{override}   is not of the form key=value; write {plain}=VALUE")
    if not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", key):
        raise ConfigError(f"{override}   {shown(key)} is not a dotted path; write section.field=VALUE")
    if key == "extends":
        raise ConfigError(f"{override}   extends works only inside a config file")
    if not text.strip():
        raise ConfigError(f"{key}   has no value; write {key}=null to unset it, or {key}='\"\"' for empty text")
    try:
        value = parse_yaml(text, "VALUE")
    except ConfigError as error:
        reason = error.message.partition(": ")[2].splitlines()[-1].strip()
        raise ConfigError(f"{key}   {shown(text)} is not YAML: {reason}; put quotes around text") from None
    if value is None and text.lstrip().startswith("#"):
        raise ConfigError(f"{key}   {shown(text)} is a comment in YAML; put quotes around text")
    return key.split("."), value


def _layer(origin: str, tree: Mapping[str, Any]) -> Layer:
    whole = [
        (section, field)
        for section, field in SOURCES
        if isinstance(tree.get(section), dict) and isinstance(tree[section].get(field), str | list)
    ]
    return Layer(origin, expand_sources(tree), tuple(whole))


def _locate_files(tree: dict[str, Any], folder: Path) -> None:
    """The one place where relative paths are resolved, in place.

    A data source or a pattern of them, a .jinja template or a model directory that exists from the current directory, or
    else from `folder` (the config file's), becomes an absolute path, so that a run can be resumed from anywhere.
    Everything else stays as typed: it may be the name of something on the Hub.
    """
    holders: list[tuple[Any, str]] = [(source, "path") for source in given_sources(tree)]
    model = tree.get("model")
    holders += [(model, key) for key in ("name", "tokenizer", "chat_template")]
    for holder, key in holders:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, str) or not value or (key == "chat_template" and not value.endswith(".jinja")):
            continue
        found = [place / value for place in (Path(), folder) if _exists(place / value, key)]
        if found:
            holder[key] = str(found[0].absolute() if glob.has_magic(value) else found[0].resolve())


def _find(reference: str, folder: Path | None) -> Document | None:
    """The file `reference`, relative to `folder`, if there is one, else the recipe; recipes have no folder."""
    path = None if folder is None else folder / Path(reference).expanduser()
    if path is not None and _is_file(path):
        try:
            return Document(str(path), path.read_text("utf-8-sig"), path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    recipe = _recipes().get(reference)
    return None if recipe is None else Document(reference, recipe.read_text("utf-8"), None)


def _references(document: Document, value: Any, problems: list[str]) -> list[str]:
    references = [value] if isinstance(value, str) else value
    if isinstance(references, list) and all(isinstance(item, str) for item in references):
        return references
    problems.append(f"extends   {shown(value)} is not a file, a recipe's name, or a list of them (in {document.name})")
    return []


def _same(one: Document, other: Document) -> bool:
    if one.path is None or other.path is None:
        return one.path is other.path and one.name == other.name
    return one.path.resolve() == other.path.resolve()


def _nest(tree: dict[str, Any], addition: Mapping[str, Any]) -> None:
    for key, value in addition.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _nest(tree[key], value)
        else:
            tree[key] = value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a null character
        return False


def _exists(path: Path, key: str) -> bool:
    try:
        start = Path(path.anchor)
        matches = glob.has_magic(str(path)) and any(start.glob(str(path.relative_to(start))))
        return path.is_file() or (key != "chat_template" and (path.is_dir() or matches))
    except (OSError, ValueError):
        return False


def _recipes() -> dict[str, Traversable]:
    folder = recipes_folder()
    found: Iterator[Traversable] = folder.iterdir() if folder.is_dir() else iter(())
    return {
        entry.name.removesuffix(".yaml"): entry for entry in sorted(found, key=_name) if entry.name.endswith(".yaml")
    }


def recipes_folder() -> Traversable:
    """The package's folder of recipes."""
    return resources.files("sft_dist") / "resources" / "recipes"


def _name(entry: Traversable) -> str:
    return entry.name


def _first_comment(text: str) -> str:
    return next((line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")), "")
