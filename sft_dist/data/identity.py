"""What tokenised rows depend on, as one key: the sources' content, the tokenizer, the template and the settings."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config, SourceConfig, SourcePart
from sft_dist.data.hub import hub_dataset
from sft_dist.data.paths import is_saved, kind_of, source_files
from sft_dist.data.template import ChatTemplate
from sft_dist.errors import DataError
from sft_dist.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Raised when the same rows become other tokens or labels; a new release alone refuses no run that goes on.
FORMAT = "4"
# The same for the rows that documents are packed into.
PACKING = "2"
# The same for the rows that are held out, where a weight makes copies.
COPIES = "2"
# A file that changed within so many seconds may change again without its time showing it.
SETTLED_S = 5.0


def data_key(config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, cache: Path) -> str:
    """The name of the folder with the rows of `config`, tokenised. Raises DataError if a source cannot be read.

    Files count by their content, so that a copy elsewhere has the same key; a content read before is known by the
    file's size and time.
    """
    data = config.data
    parts: list[Any] = [FORMAT, data.model_dump(mode="json", exclude={"train", "eval", "limits"})]
    parts.append(config.run.seed if data.eval_size else None)
    parts += [["packing", PACKING]] if data.packing else []
    # Copies that a weight makes were held out one by one before.
    copied = data.eval_size and any(part.weight > 1 for part in data.train.parts)
    parts += [["copies", COPIES]] if copied else []
    parts += [_tokenizer(tokenizer), template.training_text, template.has_markers]
    for split, source in (("train", data.train), ("eval", data.eval)):
        parts.append([split, None if source is None else _source(source, cache)])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        known = json.dumps(sorted(tokenizer.get_vocab().items()))
        return [type(tokenizer).__name__, known, tokenizer.special_tokens_map]
    # What the last call set is not what the tokenizer is; each call sets it anew.
    backend.no_truncation()
    backend.no_padding()
    return [hashlib.sha256(backend.to_str().encode()).hexdigest(), tokenizer.special_tokens_map]


def _source(source: SourceConfig, cache: Path) -> list[Any]:
    return [[_settings(part), _content(part, cache)] for part in source.parts]


def _settings(part: SourcePart) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude={"path", "sources"})


def _content(part: SourcePart, cache: Path) -> list[Any]:
    if part.task is not None:
        return [
            _module("sft_dist.data.tickets"),
            _module("sft_dist.data.tickets_zh"),
            _module(f"sft_dist.data.{part.task}"),
        ]
    files = source_files(part.path or "")
    if files is None:
        return [hub_dataset(part)._fingerprint]
    whole = [inner for path in files for inner in (sorted(path.rglob("*")) if is_saved(path) else [path])]
    return [[kind_of(path), file_digest(path, cache)] for path in whole if path.is_file()]


def _module(name: str) -> str:
    """A hash of a module's text: another text may make other rows."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(name)
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def file_digest(path: Path, cache: Path) -> str:
    """The SHA-256 of a file's content, kept below `cache` until its size or time change. Raises DataError."""
    try:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:20]
        note = cache / "data" / "digests" / f"{name}.json"
        known = _read_note(note)
        if known.get("state") == state:
            return str(known["sha256"])
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", hint="check the path and its permissions"
        ) from error
    if time.time() - stat.st_mtime > SETTLED_S:
        try:
            write_json(note, {"file": str(path), "state": state, "sha256": digest})
        except OSError as error:
            log.debug("%s cannot be written: %s", note, error)
    return digest


def _read_note(note: Path) -> dict[str, Any]:
    try:
        return read_json(note) or {}
    except ValueError:
        return {}
