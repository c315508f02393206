"""Texts that are tokenised by way of remembered pieces become the tokens that the library makes of them as a whole."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft_dist.data import pieces
from sft_dist.data.encode import Encoder
from sft_dist.data.pieces import EXPRESSIONS, Pieces, cut_at_spaces
from sft_dist.train.tokenizer import RunTokenizer

CORPUS = [
    "the model reads a row of text and learns which token comes next, when people ask\n",
    "def f(x):\n    return x + 12  # adds\n\n\tif x == 3.14:\r\n\t\tprint('it\\'s')\n",
    "Stra\u00dfe caf\u00e9 \u6771\u4eac\u306f\u65e5\u672c \u0928\u092e\u0938\u094d\u0924\u0947 1234567 ",
]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {f"expression {number}": text for number, text in enumerate(sorted(EXPRESSIONS))}


def split(expression: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior)


def tokenizer_with(cut: Any, normalizer: Any = None, added: tuple[Any, ...] = ("<|end|>",)) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder, made.normalizer = cut, decoders.ByteLevel(), normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens([AddedToken(token) if isinstance(token, str) else token for token in added])
    return made


def sizes(tokenizer: Any) -> np.ndarray[Any, Any]:
    found = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token, number in tokenizer.get_vocab().items():
        found[number] = len(token.encode()) if token in special else len(token)
    return found


WHITE = [chr(code) for code in range(0x3100) if unicodedata.category(chr(code)) in ("Zs", "Zl", "Zp", "Cc", "Cf")]
SIGNS = ["a", "The", "row", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "1", "12345", "'s", "'LL", ".", ");", "\u00e9", "e\u0301", "\u6771", "\u0947",
    "\U0001f389", "<|end|>", "\xa0", "\u3000", "\u2028", "\x85", "\x1c", "\u200b", "\u0301", "/", "(", "<", "\u0338", "_", "'", "\x0b", "\u00bd", "\u0661", "\u0436\u0437", "-", "\r"]  # fmt: skip


def hostile(count: int, seed: int = 1) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(SIGNS, k=generator.randrange(20))) for _ in range(count)] + [
        text for white in WHITE for text in (f"a{white} b", f"a {white} b", f"{white} {white}1 ", f" {white}a")
    ]


def assert_same(tokenizer: Any, texts: list[str], batch: int = 37) -> Pieces:
    made = Pieces(tokenizer, sizes(tokenizer))
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        whole = tokenizer.encode_batch(some, add_special_tokens=False)
        for text, ours, theirs in zip(some, made.encode(some), whole, strict=True):
            assert ours.tolist() == theirs.ids, repr(text)
    return made


@pytest.mark.parametrize("composed", [False, True], ids=["as it is", "composed"])
@pytest.mark.parametrize(
    "cut",
    [
        GPT2,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]),
        *(pre_tokenizers.Sequence([split(text), BYTES]) for text in CUTS.values()),
    ],
    ids=["gpt2", "digits", "numbers", *CUTS],
)
def test_ids_are_those_of_the_whole_text(cut: Any, composed: bool) -> None:
    tokenizer = tokenizer_with(cut, normalizers.NFC() if composed else None)
    assert cut_at_spaces(tokenizer, tokenizer.get_added_tokens_decoder().values())
    made = assert_same(tokenizer, hostile(600))
    assert made._words and made._others


def test_pieces_are_forgotten_when_there_are_many_and_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "REMEMBERED", 20)
    made = assert_same(tokenizer_with(GPT2), hostile(300) + [" ".join(CORPUS)] * 50)
    assert len(made._words) < 20 + 37 * 20


def test_a_piece_is_tokenised_once() -> None:
    tokenizer, asked = tokenizer_with(GPT2), []

    class Watched:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            asked.extend(texts)
            return tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    made = Pieces(Watched(), sizes(tokenizer))
    made.encode(["the row of text", "the text of a row", "the row of  text\n"])
    assert asked == ["the row of text", " a", "  text\n"]
    made.encode(["the a row text of text", "the row of  text\n"])
    assert len(asked) == 3
    made.encode(["the " + "long" * pieces.LONGEST])
    made.encode(["the " + "long" * pieces.LONGEST])
    assert asked[3:] == [" " + "long" * pieces.LONGEST] * 2, "long pieces are not kept"


@pytest.mark.parametrize(
    ("cut", "added"),
    [
        (None, ()),
        (BYTES, ()),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), ()),
        (pre_tokenizers.Metaspace(), ()),
        (pre_tokenizers.BertPreTokenizer(), ()),
        (pre_tokenizers.Sequence([split(r"\p{L}+ \p{L}+|\s+"), BYTES]), ()),
        (pre_tokenizers.Sequence([split(CUTS["expression 0"], "merged_with_next"), BYTES]), ()),
        (pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), GPT2]), ()),
        (GPT2, ("two words",)),
        (GPT2, (AddedToken("<x>", lstrip=True),)),
        (GPT2, (AddedToken("<x>", rstrip=True),)),
        (GPT2, (AddedToken("x", single_word=True),)),
    ],
)
def test_other_tokenizers_are_given_whole_texts(cut: Any, added: tuple[Any, ...]) -> None:
    tokenizer = tokenizer_with(GPT2, added=added)
    tokenizer.pre_tokenizer = cut
    assert not cut_at_spaces(tokenizer, tokenizer.get_added_tokens_decoder().values())


def test_a_tokenizer_that_drops_merges_at_random_is_given_whole_texts() -> None:
    tokenizer = tokenizer_with(GPT2)
    assert cut_at_spaces(tokenizer, ())
    tokenizer.model.dropout = 0.1
    assert not cut_at_spaces(tokenizer, ())


def test_a_tokenizer_is_probed_before_its_pieces_are_relied_upon(
    tiny_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: RunTokenizer = tiny_tokens()
    assert Encoder(tokens.tokenizer)._pieces is not None
    right = Pieces.encode
    monkeypatch.setattr(
        Pieces, "encode", lambda self, texts: [ids[: len(ids) // 30 * 30] for ids in right(self, texts)]
    )
    assert Encoder(tokens.tokenizer)._pieces is None
