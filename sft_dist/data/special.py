"""Special tokens that a row's own words spell: the tokenizer takes them for those by which the template marks turns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sft_dist.data.example import Example
from sft_dist.data.template import REASONING, ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpecialTexts:
    """Finds them in messages. Plain text is not looked at: there they are meant, since no template writes any.

    Looked for are the tokens that begin and end a text, and the special ones that stand in the template; others, those of
    `model.new_special_tokens` among them, have a place in words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        ends = {tokenizer.bos_token, tokenizer.eos_token}
        found = [it for it in special if it.strip() and (it in ends or it in template.text)]
        self._pattern = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")

    def of(self, example: Example) -> set[str]:
        """Those that the row's messages spell."""
        texts = [message[key] for message in example.messages for key in ("content", *REASONING) if message.get(key)]
        return {found for text in texts for found in self._pattern.findall(text)}
