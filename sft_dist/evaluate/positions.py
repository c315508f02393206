"""Models that look positions up in a table, as GPT-2 and OPT do: beyond its end they can neither be trained nor asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_dist.config.schema import Config, ModelConfig, SetConfig
from sft_dist.data.example import Example, expected_answer
from sft_dist.errors import ConfigError
from sft_dist.evaluate.generate import prompt_ids
from sft_dist.evaluate.held_out import prompt_of
from sft_dist.evaluate.likelihood import candidate
from sft_dist.evaluate.metrics import LIKELIHOODS
from sft_dist.evaluate.room import positions, refuse_beyond
from sft_dist.train.pretrained import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_dist.data.prepared import Prepared


def prove_positions(
    config: Config, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, held_out: dict[str, list[Example]]
) -> None:
    """Raise ConfigError if a row, a question or an answer needs more positions than the model has."""
    limit = _positions_of(config.model)
    if limit is None:
        return
    longest = _longest_document(prepared)
    if longest > limit:
        raise ConfigError(
            f"data.max_length is {config.data.max_length} and rows have up to {longest} tokens, but "
            f"{config.model.name} has a table of {limit} positions and takes no more",
            hint=f"set data.max_length={limit}",
        )
    evaluate, options = config.evaluate, config.evaluate.generation
    system = evaluate.system or config.data.system
    opening = [{"role": "system", "content": system}] if system else []
    for question in evaluate.questions:
        ids = prompt_ids(tokenizer, [*opening, {"role": "user", "content": question}], options.enable_thinking)
        refuse_beyond(limit, len(ids), options.max_new_tokens, "evaluate.questions")
    for spec in evaluate.all_sets:
        for example in held_out.get(spec.name, ()):
            _prove_row(config, tokenizer, spec, example, limit)


def _prove_row(
    config: Config, tokenizer: PreTrainedTokenizerBase, spec: SetConfig, example: Example, limit: int
) -> None:
    options, prompt = config.evaluate.generation, prompt_of(example)
    if any(metric not in LIKELIHOODS for metric in spec.metrics):
        asked = len(prompt_ids(tokenizer, prompt, options.enable_thinking))
        refuse_beyond(limit, asked, spec.max_new_tokens or options.max_new_tokens, example.where)
    given = [*spec.labels, *([expected_answer(example).strip()] if "perplexity" in spec.metrics else [])]
    for answer in given:
        refuse_beyond(limit, len(candidate(tokenizer, prompt, answer, options.enable_thinking).ids), 0, example.where)


def _longest_document(prepared: Prepared) -> int:
    """Tokens of the longest training or held-out row; in packed rows positions begin anew with each document."""
    longest = int((prepared.ledger.get("eval") or {}).get("longest_row", 0))
    if "seq_lengths" in prepared.train.column_names:
        return max(longest, *(int(max(sizes)) for sizes in prepared.train["seq_lengths"]))
    return max(longest, int(prepared.ledger["train"]["longest_row"]))


def _positions_of(model: ModelConfig) -> int | None:
    """`positions` of a model that is not loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.trust_remote_code:  # what its code looks up cannot be told before it runs
        return None
    config = AutoConfig.from_pretrained(resolve_model(model.name), revision=model.revision)
    if getattr(config, "rope_parameters", None) or not getattr(config, "max_position_embeddings", None):
        return None  # most models; spares them the building of an empty one
    try:
        with torch.device("meta"):
            return positions(AutoModelForCausalLM.from_config(config))
    except (ValueError, ImportError):  # loading it will say why
        return None
