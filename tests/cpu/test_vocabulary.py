"""Tokens that a vocabulary lacks: added, given a sensible start, trained, and kept by what is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.config.schema import ModelConfig
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train.model import load_model
from sft_dist.train.tokenizer import RunTokenizer, load_tokenizer

CHINESE = "\u59d3\u540d\u8ba2\u5355\u53f7\u90ae\u7bb1\u662f\u7684\u6211"
ASCII = (*'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@._-{}":,', "name", "email", "order")


@pytest.fixture(scope="session")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`chinese(tied=True)` is a small model whose WordPiece vocabulary holds a few Chinese characters and nothing else."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def make(tied: bool) -> Path:
        folder = tmp_path_factory.mktemp("chinese")
        words = ["[PAD]", "[UNK]", "[SEP]", "<|im_start|>", "<|im_end|>", *CHINESE, "\u8ba2\u5355"]
        backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "<|im_end|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make


def loaded(folder: Path, **fields: object) -> tuple[RunTokenizer, torch.nn.Module]:
    spec = ModelConfig(name=str(folder), **fields)
    tokens = load_tokenizer(spec)
    return tokens, load_model(spec, tokens, dtype="float32", attn_implementation="sdpa")


def test_added_tokens_end_the_unknown_ones_and_tell_letters_by_case(chinese: Callable[[bool], Path]) -> None:
    folder = chinese(True)
    text = '{"name": "\u6211", "email": "Ann.B-7@x.de"}'
    before = load_tokenizer(ModelConfig(name=str(folder))).tokenizer
    after = load_tokenizer(ModelConfig(name=str(folder), new_tokens=ASCII)).tokenizer
    assert before.unk_token_id in before(text)["input_ids"]
    ids = after(text)["input_ids"]
    assert after.unk_token_id not in ids
    assert after.convert_tokens_to_ids("A") != after.convert_tokens_to_ids("a")
    assert "".join(after.convert_ids_to_tokens(ids)) == text.replace(" ", "")
    assert after.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_special_tokens_are_left_out_of_shown_text_and_known_ones_are_not_added(
    chinese: Callable[[bool], Path],
) -> None:
    fields = {"new_special_tokens": ("<field>",), "new_tokens": ("abc", "\u6211", "abc")}
    tokens = load_tokenizer(ModelConfig(name=str(chinese(True)), **fields))
    assert list(tokens.pieces) == ["<field>", "abc"]
    ids = tokens.tokenizer("<field>\u6211abc")["input_ids"]
    assert tokens.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "\u6211abc"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_start_at_the_mean_of_their_pieces(chinese: Callable[[bool], Path], tied: bool) -> None:
    folder = chinese(tied)
    word = "\u8ba2\u5355\u59d3"  # two pieces that the vocabulary knows (as one word, and as a rest that it does not)
    tokens, model = loaded(folder, new_tokens=("\u59d3\u540d", word, "xyz"))
    old = load_file(folder / "model.safetensors")
    ends = {"model.embed_tokens.weight": model.get_input_embeddings().weight}
    ends |= {} if tied else {"lm_head.weight": model.get_output_embeddings().weight}
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for name, weight in ends.items():
        rows = old[name]
        assert weight.shape[0] == 64 and model.config.vocab_size == 64
        assert torch.equal(weight[: len(rows)], rows)
        for token, pieces in tokens.pieces.items():
            expected = rows[list(pieces)].mean(0) if pieces else rows.mean(0)
            row = weight[tokens.tokenizer.convert_tokens_to_ids(token)]
            assert torch.allclose(row, expected, atol=1e-6), token
        assert torch.allclose(
            weight[len(tokens.tokenizer) :], rows.mean(0).expand(64 - len(tokens.tokenizer), -1), atol=1e-6
        )
    assert tokens.pieces["\u59d3\u540d"] and not tokens.pieces["xyz"]


def test_enough_room_is_left_as_it_is(tiny_model_dir: Path) -> None:
    _, model = loaded(tiny_model_dir)
    assert model.get_input_embeddings().weight.shape[0] == 512


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_run_trains_and_publishes_them(
    new_run: Callable[..., RunDir], chinese: Callable[[bool], Path], tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = chinese(tied)
    run = new_run(
        f"model.name={folder}",
        "model.new_tokens=[refund, billing, a, b, c]",
        "data.limits.max_unknown=1",  # five tokens do not make English rows of a Chinese vocabulary
        "train.max_steps=2",
        "train.learning_rate=0.01",
        "evaluate={before: false, after: false}",
    )
    run_here(run)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert len(tokenizer("refund")["input_ids"]) == 1
    assert model.get_input_embeddings().weight.shape[0] == 64
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
