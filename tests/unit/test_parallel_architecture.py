"""Exact parameter counts from config.json, and a clear refusal of what cannot be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import ModelConfig
from sft_dist.errors import PreflightError
from sft_dist.parallel.architecture import cached_config, find_architecture, packaged, read_architecture

# Totals of the published weights; tests/cpu/test_planner_counts.py counts every kind of model with transformers.
KNOWN = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "embedded:smollm2-135m": 134_515_008,
    "embedded:tiny": 106_816,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(("name", "total"), KNOWN.items(), ids=KNOWN)
def test_packaged_models_have_their_exact_number_of_parameters(name: str, total: int) -> None:
    architecture, origin = find_architecture(ModelConfig(name=name))
    assert architecture.total_params == total
    assert origin == "packaged numbers"


@pytest.mark.parametrize(
    ("name", "layers", "head"),
    [
        ("Qwen/Qwen3-0.6B", 0.440, 0.156),
        ("Qwen/Qwen3-1.7B", 1.409, 0.311),
        ("Qwen/Qwen3-4B", 3.633, 0.389),
        ("Qwen/Qwen3-8B", 6.946, 0.622),
        ("HuggingFaceTB/SmolLM2-135M", 0.106, 0.028),
        ("meta-llama/Meta-Llama-3-8B", 6.979, 0.525),
    ],
)
def test_what_a_token_is_multiplied_with(name: str, layers: float, head: float) -> None:
    architecture = read_architecture(packaged()[name], name)
    assert architecture.layers * architecture.layer_matmul / 1e9 == pytest.approx(layers, abs=5e-4)
    assert architecture.embedding_params / 1e9 == pytest.approx(head, abs=5e-4)
    assert architecture.matmul_params == architecture.layers * architecture.layer_matmul + architecture.embedding_params


def test_every_packaged_entry_can_be_read() -> None:
    for name, tree in packaged().items():
        assert read_architecture(tree, name).max_positions >= 2048, name


def test_a_local_directory_wins_over_the_packaged_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen3-0.6B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    architecture, origin = find_architecture(ModelConfig(name="Qwen/Qwen3-0.6B"))
    assert architecture.layers == 2
    assert origin.endswith("config.json")


@pytest.mark.parametrize("revision", [None, "v1", "c0ffee"])
def test_the_hub_cache_is_read_by_file(tmp_path: Path, revision: str | None) -> None:
    model = tmp_path / "hub" / "models--someone--model"
    snapshot = model / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 5}))
    (model / "refs").mkdir()
    for name in ("main", "v1"):
        (model / "refs" / name).write_text("c0ffee")
    assert cached_config("someone/model", revision) == snapshot / "config.json"
    architecture, origin = find_architecture(ModelConfig(name="someone/model", revision=revision))
    assert (architecture.layers, origin) == (5, "config.json in the Hub's cache")
    assert cached_config("someone/model", "other") is None
    assert cached_config("./model", None) is None


def test_the_decoder_inside_of_a_model_that_sees_images_is_counted() -> None:
    tree = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 16}}
    architecture = read_architecture(tree, "x")
    assert (architecture.family, architecture.qk_norm, architecture.norms, architecture.tied) == (
        "gemma3_text",
        True,
        4,
        True,
    )


def test_biases_where_they_are() -> None:
    plain = read_architecture(LLAMA, "x")
    biased = read_architecture({**LLAMA, "attention_bias": True, "mlp_bias": True}, "x")
    qwen = read_architecture({**LLAMA, "model_type": "qwen2"}, "x")
    assert plain.biases == 0
    assert biased.biases == (64 + 32 + 32 + 64) + (128 + 128 + 64)
    assert qwen.biases == 64 + 32 + 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "mamba"}, "none of llama"),
        ({"hidden_size": None}, "no number"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_a_way_out(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PreflightError, match=words) as refused:
        read_architecture({**LLAMA, **change}, "some/model")
    assert "some/model" in str(refused.value)
    assert refused.value.hint


def test_a_missing_key_is_named() -> None:
    tree = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    with pytest.raises(PreflightError, match="vocab_size"):
        read_architecture(tree, "x")


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    with pytest.raises(PreflightError, match=r"did you mean Qwen/Qwen3-8B\?") as refused:
        find_architecture(ModelConfig(name="Qwen/Qwen3-8b"))
    assert "hf download" in (refused.value.hint or "")


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": -3},
        {"vocab_size": 0},
        {"hidden_size": float("inf")},
        {"hidden_size": 1024.5},
        {"intermediate_size": float("nan")},
    ],
)
def test_what_is_no_count_is_named(change: dict[str, Any]) -> None:
    """A traceback, or a plan for a model of -3 layers."""
    with pytest.raises(PreflightError, match=r"config\.json of mine holds what is no number"):
        read_architecture({**LLAMA, **change}, "mine")


def test_a_directory_without_a_config_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"no config\.json of") as refused:
        find_architecture(ModelConfig(name=str(tmp_path)))
    assert "hf download" not in (refused.value.hint or "")
