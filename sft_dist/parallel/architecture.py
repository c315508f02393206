"""What a model is made of, counted from its config.json alone: no weights, no torch, no network."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sft_dist.config.schema import ModelConfig
from sft_dist.errors import PreflightError


@dataclass(frozen=True)
class _Family:
    """How the models of one `model_type` differ from Llama, as transformers builds them."""

    qk_norm: bool = False
    norms: int = 2
    """Norms of the width of the hidden state in one layer."""
    biased: str = ""
    """Projections with a bias whatever the config says; `attention_bias: true` gives one to q, k, v and o."""
    tied: bool = False
    """Whether a config.json that does not say so shares the embedding with the head."""
    head_dim: int | None = None
    """Where the config.json does not say so; None is hidden_size / heads."""


FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "smollm3": _Family(tied=True),
    "qwen2": _Family(biased="qkv"),
    "qwen3": _Family(qk_norm=True, head_dim=128),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(norms=4, tied=True, head_dim=256),
    "gemma3_text": _Family(qk_norm=True, norms=4, tied=True, head_dim=256),
}
# Keys that say that the feed-forward is a set of experts, of which a token sees some.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Architecture:
    """A decoder: attention with grouped heads, a gated feed-forward of three matrices, RMSNorm, one embedding."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    """Whether the head is the embedding."""
    qk_norm: bool
    norms: int
    biases: int
    """Elements of the biases in one layer."""
    max_positions: int

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads together; the values' is the same."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix in one layer, by transformers' name."""
        h, q, k, f = self.hidden, self.query, self.key, self.ffn
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        return {**attention, "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def layer_matmul(self) -> int:
        """Elements of one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer_params(self) -> int:
        """Elements of one layer: matrices, biases and norms."""
        qk_norms = 2 * self.head_dim if self.qk_norm else 0
        return self.layer_matmul + self.biases + self.norms * self.hidden + qk_norms

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def tail_params(self) -> int:
        """Elements of the last unit: the final norm and the head, be it the embedding or a matrix of its own."""
        return self.embedding_params + self.hidden

    @property
    def total_params(self) -> int:
        embeddings = self.embedding_params * (1 if self.tied else 2)
        return self.layers * self.layer_params + embeddings + self.hidden

    @property
    def matmul_params(self) -> int:
        """Elements that a token is multiplied with: every matrix and the head; looking up an embedding is none."""
        return self.layers * self.layer_matmul + self.embedding_params

    @property
    def tensors(self) -> int:
        """Parameter tensors in the whole model: what a sharding engine has a hook for."""
        per_layer = len(self.linears) + self.norms + (2 if self.qk_norm else 0)
        return self.layers * per_layer + (2 if self.tied else 3)


def read_architecture(tree: Mapping[str, Any], name: str) -> Architecture:
    """The architecture that a config.json describes; `name` is what messages call the model.

    Raises PreflightError for what is not counted: experts, encoders and decoders, unknown kinds.
    """
    text = tree.get("text_config")
    if isinstance(text, Mapping):  # of a model that also sees images: what is trained on text is its decoder
        tree = text
    kind = str(tree.get("model_type", "missing"))
    if tree.get("is_encoder_decoder"):
        raise _uncounted(name, kind, "an encoder with a decoder, not a causal language model")
    if any(tree.get(key) for key in EXPERTS):
        raise _uncounted(name, kind, "a mixture of experts, whose memory and time depend on the routing")
    if kind not in FAMILIES:
        raise _uncounted(name, kind, f"none of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        hidden, heads = _count(tree["hidden_size"]), _count(tree["num_attention_heads"])
        kv_heads = _count(tree.get("num_key_value_heads") or heads)
        head_dim = _count(tree.get("head_dim") or family.head_dim or hidden // heads)
        query, key = heads * head_dim, kv_heads * head_dim
        widths = {"q": query, "k": key, "v": key, "o": hidden}
        biased = "qkvo" if tree.get("attention_bias") else family.biased
        ffn = _count(tree["intermediate_size"])
        mlp_biases = 2 * ffn + hidden if tree.get("mlp_bias") else 0
        return Architecture(
            family=kind,
            hidden=hidden,
            layers=_count(tree["num_hidden_layers"]),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=ffn,
            vocab=_count(tree["vocab_size"]),
            tied=bool(tree.get("tie_word_embeddings", family.tied)),
            qk_norm=family.qk_norm,
            norms=family.norms,
            biases=sum(widths[letter] for letter in biased) + mlp_biases,
            max_positions=int(tree.get("max_position_embeddings") or 0),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else f"holds what is no number: {error}"
        raise PreflightError(
            f"the config.json of {name} {reason}", hint="the planner reads it as transformers writes it"
        ) from None


def _count(value: Any) -> int:
    """`value` as a number of something. ValueError for nothing, less than nothing, and parts."""
    number = int(value)
    if number < 1 or (isinstance(value, float) and number != value):
        raise ValueError(f"{value} where something is counted")
    return number


def _uncounted(name: str, kind: str, why: str) -> PreflightError:
    return PreflightError(
        f"the planner cannot count {name}: its model_type {kind!r} is {why}",
        hint="set parallel.plan, train.per_device_train_batch_size and train.gradient_checkpointing yourself, "
        "and start with a few steps: train.max_steps=3",
    )


def find_architecture(model: ModelConfig) -> tuple[Architecture, str]:
    """The architecture of the config's `model`, and where its numbers are from. PreflightError if it is not known."""
    tree, origin = find_config(model)
    return read_architecture(tree, model.name), origin


def find_config(model: ModelConfig) -> tuple[Mapping[str, Any], str]:
    """What the model's config.json holds, and where it is from.

    Looks for it in a local directory, then in the Hub's cache on this machine, then among the packaged numbers. Raises
    PreflightError if none of them knows the model.
    """
    name = model.name
    folder = Path(name).expanduser()
    if not name.startswith("embedded:") and (folder / "config.json").is_file():
        return _read(folder / "config.json"), str(folder / "config.json")
    cached = cached_config(name, model.revision)
    if cached is not None:
        return _read(cached), "config.json in the Hub's cache"
    known = packaged()
    if name in known:
        return known[name], "packaged numbers"
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    fetched = "" if folder.is_dir() else f", or fetch it once: hf download {name} config.json"
    raise PreflightError(
        f"the planner knows no config.json of {name}{guess}",
        hint=f"set model.name to a directory that holds one{fetched}",
    )


def cached_config(name: str, revision: str | None) -> Path | None:
    """config.json of a Hub model in the cache on this machine, found without the Hub's library; None if not there."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    root = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folder = Path(root or Path(home) / "hub").expanduser() / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    except OSError:
        commit = wanted
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


@functools.cache
def packaged() -> dict[str, dict[str, Any]]:
    """config.json fields by Hub id, of the models that recipes name and their relatives."""
    text = (resources.files("sft_dist") / "resources" / "architectures.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any] | str] = json.loads(text)
    # A plain string is the id of another entry with the same shape.
    trees = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    return {name: trees[entry] if isinstance(entry, str) else entry for name, entry in entries.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise PreflightError(f"{path} is not a model's config.json")
    return tree
