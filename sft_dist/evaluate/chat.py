"""Talk to a run's model in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.evaluate.compare import Loaded
from sft_dist.evaluate.generate import left_pad, prompt_ids
from sft_dist.evaluate.generate import settings as generation_settings
from sft_dist.evaluate.room import positions, refuse_beyond

HELP = "type a message; /reset forgets the conversation, /exit or Ctrl-D ends"


def chat(config: Config, loaded: Loaded, read: Callable[[], str], streamer: Any, note: Callable[[str], None]) -> None:
    """Answer what `read` returns, turn by turn, until it raises EOFError or returns /exit.

    Answers are streamed to `streamer` (a transformers TextStreamer) and kept as context for the next turn; an unknown
    command gets the help through `note`, and so is told what cannot be asked: it is forgotten, and the conversation goes on.
    """
    system = config.evaluate.system or config.data.system
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            messages = list(opening)
        elif text.startswith("/"):
            note(HELP)
        elif text:
            question = {"role": "user", "content": text}
            try:
                answer = _answer(config, loaded, [*messages, question], streamer)
            except ConfigError as error:
                note(f"{error}; or /reset")
            else:
                messages += [question, {"role": "assistant", "content": answer}]


@torch.inference_mode()
def _answer(config: Config, loaded: Loaded, messages: list[dict[str, str]], streamer: Any) -> str:
    options = config.evaluate.generation
    ids = prompt_ids(loaded.tokenizer, messages, options.enable_thinking)
    refuse_beyond(positions(loaded.model), len(ids), options.max_new_tokens, "this conversation")
    inputs = left_pad([ids], int(loaded.tokenizer.pad_token_id), loaded.model.device)
    settings = generation_settings(loaded.model, loaded.tokenizer, options)
    output = loaded.model.generate(**inputs, generation_config=settings, streamer=streamer)
    return str(loaded.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()
