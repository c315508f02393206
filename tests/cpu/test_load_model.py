"""Tests of loading under FSDP2: the main process reads the weights, the others only make place for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.integrations
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_dist.config.schema import ModelConfig
from sft_dist.train.model import load_model
from sft_dist.train.ranks import Ranks
from sft_dist.train.tokenizer import load_tokenizer

Load = Callable[[list[str]], PreTrainedModel]


class Other(Ranks):
    """The second of two processes; what the main one answers is known."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(rank=1, size=2)
        self.__dict__["names"] = names

    def by_main(self, work: Callable[[], Any]) -> Any:
        return self.__dict__["names"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reading of the model's files from now on."""
    found: list[str] = []
    plain = AutoModelForCausalLM.from_pretrained

    def from_pretrained(source: str, **settings: Any) -> PreTrainedModel:
        found.append(source)
        model: PreTrainedModel = plain(source, **settings)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.integrations, "is_fsdp_enabled", lambda: True)
    return found


@pytest.fixture
def load(tiny_model_dir: Path) -> Load:
    model = ModelConfig(name=str(tiny_model_dir))
    tokens = load_tokenizer(model)
    return lambda names: load_model(model, tokens, "float32", "sdpa", Other(names))


def test_the_others_read_no_weights(load: Load, reads: list[str], tiny_model_dir: Path) -> None:
    main = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    names = [name for name, _ in main.named_parameters()]
    reads.clear()
    model = load(names)
    assert reads == []
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert list(places) == names, "tied as the main process has them"
    assert len({*places.values(), 0}) == len(names) + 1, "accelerate tells them apart by their addresses"
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # The tokenizer's fallback template may have added tokens.
    grown = [name for name, parameter in main.named_parameters() if shapes[name] != parameter.shape]
    assert set(grown) <= {"model.embed_tokens.weight", "lm_head.weight"}
    buffers = dict(main.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert buffer.equal(buffers[name]), "no file holds it, nobody sends it"


def test_they_do_where_the_main_process_has_found_other_parameters(load: Load, reads: list[str]) -> None:
    """As where the config ties two weights and the files hold both: without reading, this process would tie them."""
    model = load(["model.embed_tokens.weight", "lm_head.weight"])
    assert len(reads) == 1
    assert not any(parameter.is_meta for parameter in model.parameters())
