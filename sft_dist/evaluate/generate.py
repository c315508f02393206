"""Batched generation through the chat template: only the new tokens, up to the end-of-turn token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sft_dist.config.schema import GenerationConfig
from sft_dist.data.template import render
from sft_dist.evaluate.asked import Asked, by_batches, prompts_at_once
from sft_dist.evaluate.continuous import BATCHES_AT_ONCE, answers_of
from sft_dist.evaluate.room import positions, refuse_beyond

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[dict[str, Any]]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, enable_thinking: bool | None = None
) -> tuple[str, bool]:
    """The prompt as the model reads it, and whether the template wrote it (and with it any BOS)."""
    if isinstance(prompt, str):
        return prompt, False
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return render(tokenizer, str(tokenizer.chat_template), prompt, add_generation_prompt=True, **options), True


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, enable_thinking: bool | None = None) -> list[int]:
    """Token ids of the prompt, with one BOS at most and no token of an end."""
    text, templated = prompt_text(tokenizer, prompt, enable_thinking)
    ids = list(tokenizer(text, add_special_tokens=not templated)["input_ids"])
    return ids if templated else ids[: len(ids) - ends_with(tokenizer)]


def ends_with(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts behind any plain text ([SEP], </s>): they would say that nothing follows."""
    alone, whole = (list(tokenizer("x", add_special_tokens=added)["input_ids"]) for added in (False, True))
    begin = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), None)
    return 0 if begin is None else len(whole) - begin - len(alone)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: GenerationConfig,
    asked: Asked | None = None,
) -> list[str]:
    """One answer a prompt, in the order of `prompts`, without special tokens and surrounding white space.

    Prompts of similar length share a batch, so that little is padded. With `asked`, what stands there is not asked again,
    and sampling draws the same each time.
    """
    encoded = [prompt_ids(tokenizer, prompt, options.enable_thinking) for prompt in prompts]
    refuse_beyond(positions(model), max(map(len, encoded), default=0), options.max_new_tokens, "asking")
    chosen = settings(model, tokenizer, options)
    # A CPU computes what is padded beside what is not; there batches are as good.
    continuous = options.engine == "continuous" and model.device.type != "cpu"
    told = options.model_dump(exclude={"batch_size"} if continuous else {"batch_size", "engine"})
    keys = [asked.key("answer", told, index, ids) for index, ids in enumerate(encoded)] if asked else ()

    def answer(batch: list[int]) -> list[str]:
        if continuous:
            seed = None if asked is None else asked.seed + batch[0]
            told_ids = answers_of(model, [encoded[index] for index in batch], chosen, seed)
            return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in told_ids]
        inputs = left_pad([encoded[index] for index in batch], int(tokenizer.pad_token_id), model.device)
        with _drawn_from(None if asked is None else asked.seed + batch[0], model.device):
            output = model.generate(**inputs, generation_config=chosen)
        width = inputs["input_ids"].shape[1]
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output[:, width:].tolist()]

    at_once = prompts_at_once(options, generates_on_gpu=model.device.type != "cpu")
    at_once *= BATCHES_AT_ONCE if continuous else 1
    return by_batches([len(ids) for ids in encoded], at_once, answer, asked, keys)


@contextlib.contextmanager
def _drawn_from(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers that begin at `seed`; those of the process go on afterwards as if none had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, both [rows, longest], every row ending at the right edge."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: GenerationConfig) -> Any:
    """transformers' GenerationConfig for `options`; any of the model's end tokens ends an answer."""
    from transformers import GenerationConfig as Settings

    sampling = (
        {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
        if options.do_sample
        else {}
    )
    return Settings(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # the trainer's own setting of the model may say no
        **sampling,
    )
