"""The tokenizer of a run, with its chat template, its padding token and its end-of-turn token settled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import ModelConfig
from sft_dist.data.template import ChatTemplate, choose_template, end_of_turn
from sft_dist.errors import PreflightError
from sft_dist.export import ROWS_OF
from sft_dist.train.pretrained import resolve_model
from sft_dist.train.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A Chinese character, or a mark of its punctuation: a token of its own in vocabularies for Chinese.
CHINESE = r"[\p{Han}\u3000-\u303f\uff00-\uffef\u2018-\u201d\u2026]"
# Padding tokens by the names that model families gave them, taken when the tokenizer itself names none.
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
# What two tokenizers cut alike.
TEXTS = (
    "Order 1234, please!",
    "  two  spaces\n\tand a tab",
    "Grüße \u2014 \u4f60\u597d \U0001f389",
    "def f(x):\n    return x",
)


@dataclass(frozen=True)
class RunTokenizer:
    """The tokenizer and the template that it renders conversations with."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    pieces: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tokens that the vocabulary lacked, in the order of their ids, and what each was cut into before."""


def load_tokenizer(model: ModelConfig) -> RunTokenizer:
    """Load the tokenizer that `model` names; its eos token becomes the template's end-of-turn token.

    Raises PreflightError if there is no such tokenizer here, ConfigError if the template does not fit it.
    """
    from transformers import AutoTokenizer

    quiet_libraries()
    source = resolve_model(model.tokenizer or model.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise missing_model(model, source, "tokenizer", error) from None
    template = choose_template(tokenizer, model.chat_template)
    pieces = _add(tokenizer, (*template.new_tokens, *model.new_special_tokens), special=True)
    pieces |= _add(tokenizer, model.new_tokens, special=False)
    _without_spaces(tokenizer, model.new_tokens)
    if tokenizer.eos_token is None and template.new_tokens:
        tokenizer.eos_token = template.new_tokens[-1]
    tokenizer.chat_template = template.text
    pad = tokenizer.pad_token  # kept, even where it is the eos token: labels and masks are explicit everywhere
    tokenizer.eos_token = end_of_turn(tokenizer, template)
    known = tokenizer.get_vocab()
    tokenizer.pad_token = pad or next((name for name in PAD_TOKENS if name in known), tokenizer.eos_token)
    return RunTokenizer(tokenizer, template, pieces)


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, special: bool) -> dict[str, tuple[int, ...]]:
    """Give each of `tokens` that is not in the vocabulary an id; returns what they were cut into before."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    unknown = tokenizer.unk_token_id
    pieces = {
        token: tuple(piece for piece in tokenizer(token, add_special_tokens=False)["input_ids"] if piece != unknown)
        for token in new
    }
    if special and new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    elif new:
        # As they are written: a vocabulary that lowers its text would else take `A` for `a`.
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    return pieces


def _without_spaces(tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str]) -> None:
    """Let the texts of a WordPiece vocabulary come back without a space before Chinese characters and the run's new tokens.

    Its decoder puts one before each token that begins a word: an answer would never equal what was expected. For the texts that
    this process shows and scores; a BertTokenizer that is loaded elsewhere builds its decoder anew.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    from tokenizers import Regex, decoders

    if not isinstance(backend.decoder, decoders.WordPiece):
        return
    longest_first = sorted(new_tokens, key=len, reverse=True)
    joined = "|".join([CHINESE, *(re.escape(token) for token in longest_first)])
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace(Regex(f"^ (?=(?:{joined})$)"), "")])


def grow_embeddings(model: PreTrainedModel, tokens: RunTokenizer) -> None:
    """Give the tokenizer's new tokens rows in the model's embeddings and head, whose number becomes a multiple of 64.

    A new row starts at the mean of the rows of what its token was cut into before, or of all rows, so that no logit
    stands out; a head that is tied to the embeddings stays so. Nothing happens if there is room.
    """
    embeddings = model.get_input_embeddings()
    before = embeddings.num_embeddings  # not the weight's shape: under ZeRO-3 it is empty between its uses
    if len(tokens.tokenizer) <= before:
        return
    empty = embeddings.weight.is_meta
    model.resize_token_embeddings(len(tokens.tokenizer), pad_to_multiple_of=ROWS_OF, mean_resizing=False)
    ends = {
        id(end.weight): end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
    }
    for end in () if empty else ends.values():
        for values in (end.weight, getattr(end, "bias", None)):
            if values is not None:
                _start(values, before, tokens)


def _start(values: torch.Tensor, before: int, tokens: RunTokenizer) -> None:
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    gathered: Any = contextlib.nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([values], modifier_rank=0)
    with gathered, torch.no_grad():
        if len(values) <= before:  # another process's share
            return
        old = values[:before].float()
        values[before:] = old.mean(0).to(values.dtype)
        for token, pieces in tokens.pieces.items():
            if pieces:
                values[tokens.tokenizer.convert_tokens_to_ids(token)] = old[list(pieces)].mean(0).to(values.dtype)


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What two equal tokenizers agree on: vocabulary, special tokens, template, and how they cut some texts."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    template = str(tokenizer.chat_template).replace("\r\n", "\n")  # a file is read with newlines of one kind
    return {
        "vocabulary": hashlib.sha256(vocabulary).hexdigest(),
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
        "texts": [list(tokenizer(text)["input_ids"]) for text in TEXTS],
    }


def missing_model(model: ModelConfig, source: str, what: str, error: Exception) -> PreflightError:
    """The error for a model or tokenizer that cannot be loaded, with the library's reason in one line."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "backend tokenizer" in reason:  # the first line of a list of ways to have one, none of which names a file
        reason = "no tokenizer.json in it"
    if "ignore_mismatched_sizes" in reason:  # transformers points to a table that it has logged
        reason = "its weights have other shapes than its config.json says"
    if "trust_remote_code" in str(error):
        hint = "the model brings its own Python code: set model.trust_remote_code=true if you trust its authors"
    elif Path(source).is_dir():
        hint = (
            "a local model is a directory with config.json, tokenizer.json and *.safetensors, all of one model: copy or "
            "save them there again"
        )
        if what == "tokenizer":
            hint += ", or set model.tokenizer to a Hub id or a directory that has the tokenizer"
    else:
        hint = (
            "check the spelling; a local model is a directory with config.json, tokenizer.json and *.safetensors. A Hub "
            "model must be fetched where there is network: `hf download NAME`, with the same HF_HOME"
        )
    field = "model.tokenizer" if what == "tokenizer" and model.tokenizer else "model.name"
    name = model.tokenizer if field == "model.tokenizer" else model.name
    message = f"{field} is {name!r}, but its {what} cannot be loaded from {source!r}: {reason[:300]}"
    return PreflightError(message, hint=hint)
