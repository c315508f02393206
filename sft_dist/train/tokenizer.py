"""The tokenizer of a run, with its chat template, its padding token and its end-of-turn token settled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft_dist.config.schema import ModelConfig
from sft_dist.data.template import ChatTemplate, choose_template, end_of_turn
from sft_dist.errors import PreflightError
from sft_dist.train.pretrained import resolve_model
from sft_dist.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Padding tokens by the names that model families gave them, taken when the tokenizer itself names none.
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


@dataclass(frozen=True)
class RunTokenizer:
    """The tokenizer and the template that it renders conversations with."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate


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
    if template.new_tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(template.new_tokens)}, replace_extra_special_tokens=False
        )
    if tokenizer.eos_token is None and template.new_tokens:
        tokenizer.eos_token = template.new_tokens[-1]
    tokenizer.chat_template = template.text
    pad = tokenizer.pad_token  # kept, even where it is the eos token: labels and masks are explicit everywhere
    tokenizer.eos_token = end_of_turn(tokenizer, template)
    known = tokenizer.get_vocab()
    tokenizer.pad_token = pad or next((name for name in PAD_TOKENS if name in known), tokenizer.eos_token)
    return RunTokenizer(tokenizer, template)


def missing_model(model: ModelConfig, source: str, what: str, error: Exception) -> PreflightError:
    """The error for a model or tokenizer that cannot be loaded, with the library's reason in one line."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        hint = "the model brings its own Python code: set model.trust_remote_code=true if you trust its authors"
    else:
        hint = (
            "check the spelling; a local model is a directory with config.json, tokenizer.json and *.safetensors. A Hub "
            "model must be fetched where there is network: `hf download NAME`, with the same HF_HOME"
        )
    field = "model.tokenizer" if what == "tokenizer" and model.tokenizer else "model.name"
    name = model.tokenizer if field == "model.tokenizer" else model.name
    message = f"{field} is {name!r}, but its {what} cannot be loaded from {source!r}: {reason[:300]}"
    return PreflightError(message, hint=hint)
