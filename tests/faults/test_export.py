"""The final model is proven before it counts: whatever is wrong with it is caught, and nothing is wrong with a right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_dist.config.loader import load_config
from sft_dist.errors import CheckpointError
from sft_dist.evaluate.prove import prove, verdict
from sft_dist.evaluate.reloaded import TOLERANCE
from sft_dist.export import PROOF
from sft_dist.files import read_json, write_json
from sft_dist.rundir import RunDir

SMALL = (
    "train.max_steps=2", "checkpoint.save_strategy=no", "evaluate.before=false", "evaluate.after=false",
    "checkpoint.verify_export=full",
)  # fmt: skip


NORM = "model.norm.weight"


def trained(folder: Path, *overrides: str) -> RunDir:
    from sft_dist.stages import new_run, run_here

    run = new_run(load_config("smoke", [f"run.dir={folder}", *SMALL, *overrides]))
    run_here(run)
    return run


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str], tiny_model_dir: Path
) -> RunDir:
    return trained(tmp_path_factory.mktemp("published"), "model.dtype=float32")


@pytest.fixture
def model(published: RunDir, tmp_path: Path) -> Path:
    """A copy of the published model, to be damaged."""
    return Path(shutil.copytree(published.model, tmp_path / "model"))


def caught(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        prove(folder)
    return str(refused.value)


def unlisted(folder: Path, *names: str) -> None:
    """As if these files had been written like that: only what they mean can tell."""
    proof = read_json(folder / PROOF)
    write_json(
        folder / PROOF, {**proof, "files": {name: it for name, it in proof["files"].items() if name not in names}}
    )


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    write_json(folder / name, change(read_json(folder / name)))
    unlisted(folder, name)


# --- none false ------------------------------------------------------------------------------------------------------


def test_a_right_model_is_what_was_trained(published: RunDir, model: Path) -> None:
    proof = read_json(published.model / PROOF)
    assert proof["logits_apart"] < 1e-4
    assert (proof["tolerance_middle"], proof["tolerance"]) == TOLERANCE["float32"]
    assert len(proof["logits"]["rows"]) == 4
    assert proof["logits"]["spread"] > 0.01
    assert "of 4 expected answers" in proof["stops"]
    assert prove(model)["tensor_count"] == len(load_file(model / "model.safetensors"))
    assert verdict(published)["problem"] is None  # in a process of its own
    assert not (published.path / "model-refused").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dtype=bfloat16",),
        ("model.dtype=bfloat16", "model.lora={r: 4}"),
        ("model.dtype=bfloat16", "model.lora={r: 4, use_rslora: true}", "model.new_special_tokens=['<order>']"),
        ("model.dtype=bfloat16", "model.lora={r: 4, modules_to_save: [embed_tokens], target_modules: [q_proj]}"),
        ("model.lora={r: 4, merge: false}", "model.new_special_tokens=['<order>']"),
        ("model.new_tokens=[zyx]", "data.packing=true"),
        ("checkpoint.verify_export=files",),
    ],
)
def test_no_right_model_is_refused(tmp_path: Path, tiny_model_dir: Path, overrides: tuple[str, ...]) -> None:
    run = trained(tmp_path, *overrides)
    assert (run.model / "DONE").is_file()
    proof = read_json(run.model / PROOF)
    assert set(proof["tensors"]) == {part for part, wanted in (
        ("adapter", "lora" in str(overrides)), ("model", "merge: false" not in str(overrides))
    ) if wanted}  # fmt: skip
    assert ("logits_apart" in proof) == (proof["level"] == "full")
    assert proof.get("logits_apart", 0) < 0.05
    assert ("merged_compared" in proof) == ("adapter" in proof["tensors"] and "model" in proof["tensors"])
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert "license: unknown" in card
    assert "56 rows" in card or "data.packing=true" in overrides


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A tiny mixture of experts, which transformers joins in memory and stores one by one."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("experts"), AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", ["null", "{r: 4}"])
def test_a_mixture_of_experts_is_not_refused(tmp_path: Path, experts: Path, lora: str) -> None:
    run = trained(tmp_path, f"model.name={experts}", "model.dtype=bfloat16", f"model.lora={lora}")
    names = load_file(run.model / "model.safetensors").keys()
    assert names == load_file(experts / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names
    proof = read_json(run.model / PROOF)
    assert proof["logits_apart"] < 0.05
    if lora != "null":
        assert proof["merged_compared"] == len(names) - 2 * 4 * 3, "all but the experts"


# --- every time ------------------------------------------------------------------------------------------------------


def test_a_tensor_that_is_zeroed_is_caught_whichever_it_is(model: Path) -> None:
    file = model / "model.safetensors"
    whole = load_file(file)
    for name in whole:
        save_file({**whole, name: torch.zeros_like(whole[name])}, file, metadata={"format": "pt"})
        said = caught(model)
        assert f"{name} has other values than were trained" in said
        assert f"{name} holds nothing but zeros" in said
    save_file(whole, file, metadata={"format": "pt"})
    assert prove(model)


def last(whole: dict[str, torch.Tensor]) -> str:
    return sorted(whole)[-1]


def one_value(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensor = whole[last(whole)].clone()
        tensor.view(-1)[-1] = tensor.view(-1)[-1] + 1e-6 if value == 0 else value
        return {**whole, last(whole): tensor}

    return change


HARM = {
    "NaN": (one_value(float("nan")), "holds values that are not finite"),
    "infinity": (one_value(float("-inf")), "holds values that are not finite"),
    "a value that is a hair off": (one_value(0), "has other values than were trained"),
    "a missing tensor": (lambda whole: {n: t for n, t in whole.items() if n != last(whole)}, "is missing"),
    "a tensor too many": (lambda whole: {**whole, "extra": torch.ones(2)}, "extra was not trained"),
    "an empty tensor": (lambda whole: {**whole, last(whole): torch.ones(0)}, "is empty"),
    "another type": (lambda whole: {**whole, last(whole): whole[last(whole)].bfloat16()}, "trained was F32"),
    "another shape": (lambda whole: {**whole, last(whole): whole[last(whole)][None]}, "trained was F32"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_damaged_weights_are_caught(model: Path, harm: str) -> None:
    change, words = HARM[harm]
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    assert words in caught(model)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_file_that_is_cut_off_is_caught(model: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors" in caught(model)


def test_a_missing_shard_is_caught(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    assert "there are no weights" in caught(model)
    loaded.save_pretrained(model, max_shard_size="60KB")
    unlisted(model, "config.json", "generation_config.json")
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert prove(model)["logits_apart"] < 1e-4, "shards are no fault"
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        assert f"{shard.name} is missing" in caught(model)
        shard.write_bytes(content)
    assert prove(model)


@pytest.mark.parametrize("copy", ["model_copy.safetensors", "a.safetensors"])
def test_a_right_tensor_in_another_file_does_not_hide_a_wrong_one(model: Path, copy: str) -> None:
    file = model / "model.safetensors"
    shutil.copy(file, model / copy)
    whole = load_file(file)
    save_file({**whole, last(whole): torch.zeros_like(whole[last(whole)])}, file, metadata={"format": "pt"})
    said = caught(model)
    assert f"{copy} does not belong to it" in said
    assert "is in " in said and "model.safetensors" in said


@pytest.mark.parametrize("name", ["extra.safetensors", "adapter/other.safetensors", "pytorch_model.bin"])
def test_weights_that_do_not_belong_there_are_caught(tmp_path: Path, tiny_model_dir: Path, name: str) -> None:
    run = trained(tmp_path, "model.lora={r: 2}", "checkpoint.verify_export=files")
    save_file({"strange": torch.ones(2)}, run.model / name)
    assert f"{Path(name).name} does not belong to it" in caught(run.model)


def test_another_tokenizer_or_template_is_caught_by_its_file_and_by_what_it_does(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "tokenizer.json is not what was written" in caught(model)
    unlisted(model, "tokenizer.json")
    assert "the tokenizer is another one than was trained with (vocabulary)" in caught(model)
    file.unlink()
    assert "the tokenizer" in caught(model)


def test_another_chat_template_is_caught(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    unlisted(model, "chat_template.jinja")
    assert "(chat template)" in caught(model)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda it: {**it, "rms_norm_eps": 10.0}, "of their spread away from the trained model's"),
        ("config.json", lambda it: {**it, "num_hidden_layers": 1}, "unexpected keys"),
        ("config.json", lambda it: {**it, "num_hidden_layers": 3}, "missing keys"),
        ("generation_config.json", lambda it: {**it, "eos_token_id": 5}, "would not end at the end-of-turn token"),
    ],
)
def test_settings_that_make_another_model_of_the_same_weights_are_caught(
    model: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    changed(model, name, change)
    assert words in caught(model)


def test_verify_says_what_is_wrong_with_a_published_model(
    published: RunDir, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    run = RunDir(Path(shutil.copytree(published.path, tmp_path / "run")))
    right = run_cli("verify", run.path)
    assert right.returncode == 0, right.stderr
    assert "model: what was trained" in right.stdout
    (run.model / "tokenizer.json").unlink()
    wrong = run_cli("verify", run.path)
    assert wrong.returncode == 5
    assert "tokenizer.json is missing" in wrong.stderr
    (run.model / PROOF).unlink()
    assert verdict(run) == {"problem": None, "unproven": verdict(run)["unproven"]}
    (run.model / "DONE").unlink()
    assert verdict(run) is None


# --- before DONE -----------------------------------------------------------------------------------------------------


def as_if_trained(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the weights and what is on record of them: only a comparison with the base can tell."""
    from sft_dist.train.publish import expectations

    file, proof = folder / "model.safetensors", read_json(folder / PROOF)
    whole = change(load_file(file))
    save_file(whole, file, metadata={"format": "pt"})
    write_json(folder / PROOF, {**proof, "tensors": {"model": expectations(whole)}})


BESIDE_THE_BASE = {
    "a zeroed tensor": (
        lambda it: {**it, NORM: torch.zeros_like(it[NORM])}, f"{NORM} holds nothing but zeros"
    ),
    "zeros of the other sign": (lambda it: {**it, NORM: -torch.zeros_like(it[NORM])}, f"{NORM} holds nothing but zeros"),
    "a tensor of another type": (lambda it: {**it, NORM: it[NORM].bfloat16()}, f"{NORM} is BF16, and a model with"),
    "a tensor of another shape": (lambda it: {**it, NORM: torch.ones(3)}, f"{NORM} is [3], and [64] in the base"),
    "a tensor that the base has not": (lambda it: {**it, "zzz": torch.ones(3)}, "unexpected keys"),
    "a tensor that only the base has": (lambda it: {n: t for n, t in it.items() if n != NORM}, "missing keys"),
}  # fmt: skip


@pytest.mark.parametrize("harm", BESIDE_THE_BASE)
@pytest.mark.parametrize("logits", [True, False])
def test_what_the_base_tells_is_caught_with_and_without_logits(model: Path, harm: str, logits: bool) -> None:
    change, words = BESIDE_THE_BASE[harm]
    as_if_trained(model, change)
    if not logits:
        write_json(model / PROOF, {**read_json(model / PROOF), "logits": None})
    assert words in caught(model)


def test_a_model_of_fewer_layers_than_the_base_is_caught(model: Path) -> None:
    changed(model, "config.json", lambda it: {**it, "num_hidden_layers": 1})
    as_if_trained(model, lambda it: {name: tensor for name, tensor in it.items() if "layers.1." not in name})
    assert "is missing, which the base model's architecture has" in caught(model)


@pytest.mark.parametrize("allowed", ["zero in the base", "bias", "found so before"])
def test_zeros_that_may_be_are_no_fault(model: Path, tmp_path: Path, tiny_model_dir: Path, allowed: str) -> None:
    from sft_dist.evaluate.against_base import zero_problems
    from sft_dist.evaluate.tensor_files import headers, read_tensors

    name = "model.norm.bias" if allowed == "bias" else NORM
    save_file({name: torch.zeros(4)}, tmp_path / "model.safetensors")
    there, proof = read_tensors(tmp_path), {"zeros": [NORM] if allowed == "found so before" else []}
    base = headers(tmp_path if allowed == "zero in the base" else tiny_model_dir)
    assert not [*zero_problems(there, proof, base)]
    if allowed == "zero in the base":
        assert [*zero_problems(there, proof, headers(tiny_model_dir))], "as it is not in this one"
        assert [*zero_problems(there, proof, {})]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("generation_config.json", lambda it: {**it, "eos_token_id": 5}, "would not end at the end-of-turn token"),
        ("config.json", lambda it: {**it, "num_hidden_layers": 3}, "missing keys"),
    ],
)
def test_a_model_without_logits_on_record_is_loaded_all_the_same(
    model: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    write_json(model / PROOF, {**read_json(model / PROOF), "logits": None})
    assert "not looked at" in prove(model)["stops"]
    changed(model, name, change)
    assert words in caught(model)


@pytest.mark.parametrize("stops", [True, False])
def test_a_model_that_goes_on_where_the_trained_one_stops_is_caught(model: Path, stops: bool) -> None:
    trained_logits = read_json(model / PROOF)["logits"]
    assert trained_logits["stops"] == [True] * 4
    eos = read_json(model / PROOF)["tokenizer"]["special"]["eos"]

    def never(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        words = whole["model.embed_tokens.weight"].clone()
        words[eos] *= -1
        return {**whole, "model.embed_tokens.weight": words}

    as_if_trained(model, never)
    write_json(model / PROOF, {**read_json(model / PROOF), "logits": {**trained_logits, "stops": [stops] * 4}})
    assert ("where the trained model stops" in caught(model)) == stops


def test_who_trained_no_end_is_told(tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trained(tmp_path, "train.learning_rate=1e-6")
    assert read_json(run.model / PROOF)["logits"]["stops"] == [False] * 4
    assert "may not stop by itself: after 0 of 4 expected answers" in caplog.text


# --- before it is written --------------------------------------------------------------------------------------------


def nothing_merged(real: Callable[..., Any]) -> Callable[..., Any]:
    def lost(spec: Any, tokens: Any, folder: Path, dtype: str) -> Any:
        from sft_dist.train.model import load_model

        return load_model(spec.model_copy(update={"lora": None}), tokens, dtype=dtype, attn_implementation="sdpa")

    return lost


def one_layer_not_merged(real: Callable[..., Any]) -> Callable[..., Any]:
    def lost(spec: Any, tokens: Any, folder: Path, dtype: str) -> Any:
        whole, base = real(spec, tokens, folder, dtype), nothing_merged(real)(spec, tokens, folder, dtype)
        name = "model.layers.1.mlp.down_proj.weight"
        whole.state_dict()[name].copy_(base.state_dict()[name])
        return whole

    return lost


@pytest.mark.parametrize("harm", [nothing_merged, one_layer_not_merged])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_that_is_lost_in_merging_is_caught(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, harm: Callable[..., Any]
) -> None:
    from sft_dist.train import publish

    monkeypatch.setattr(publish, "merged", harm(publish.merged))
    with pytest.raises(CheckpointError, match="is not the base model's with the adapter merged into it"):
        trained(tmp_path, "model.lora={r: 4}", f"model.dtype={dtype}")
    assert not RunDir(tmp_path / "smoke").model.exists()


def zeroed(name: str) -> Callable[..., Any]:
    def harm(real: Callable[..., Any]) -> Callable[..., Any]:
        def gather(*words: Any) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = real(*words)
            return {each: it.clone().zero_() if each.endswith(name) else it for each, it in found.items()}

        return gather

    return harm


def without(name: str) -> Callable[..., Any]:
    return lambda real: lambda *words: {each: it for each, it in real(*words).items() if not each.endswith(name)}


def layers_swapped(real: Callable[..., Any]) -> Callable[..., Any]:
    """Every value is there, each in the place of another."""

    def gather(*words: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = real(*words)
        one, other = (f"layers.{number}.mlp.down_proj." for number in (0, 1))
        return {name: found[name.replace(one, other) if one in name else name.replace(other, one)] for name in found}

    return gather


@pytest.mark.parametrize(
    ("function", "harm", "overrides"),
    [
        ("whole_weights", layers_swapped, ()),
        ("adapter_weights", layers_swapped, ("model.lora={r: 4}",)),
        ("whole_weights", zeroed("layers.1.mlp.down_proj.weight"), ()),
        ("whole_weights", without("layers.1.mlp.down_proj.weight"), ()),
        ("adapter_weights", zeroed("layers.1.mlp.down_proj.lora_A.weight"), ("model.lora={r: 4}",)),
        ("adapter_weights", without("layers.1.mlp.down_proj.lora_B.weight"), ("model.lora={r: 4}",)),
    ],
)
def test_a_tensor_that_is_lost_in_gathering_is_caught(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, function: str, harm: Any, overrides: Any
) -> None:
    from sft_dist.train import publish

    monkeypatch.setattr(publish, function, harm(getattr(publish, function)))
    with pytest.raises(CheckpointError, match=r"gathering it lost what was trained.*layers\.[01]\.mlp\.down_proj"):
        trained(tmp_path, "model.dtype=bfloat16", "checkpoint.verify_export=files", *overrides)
    assert not RunDir(tmp_path / "smoke").model.exists()


def test_a_zeroed_tensor_is_caught_where_no_process_holds_whole_parameters(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under ZeRO-3 and FSDP2, whose gathering is all that there is to compare with."""
    from sft_dist.train import publish

    monkeypatch.setattr(publish, "lost_in_gathering", lambda *_: None)
    monkeypatch.setattr(publish, "whole_weights", zeroed("layers.1.mlp.down_proj.weight")(publish.whole_weights))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight holds nothing but zeros"):
        trained(tmp_path, "model.dtype=bfloat16", "checkpoint.verify_export=files")


@pytest.fixture
def harmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that writes the first tensor as zeros."""
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained

    def save(self: Any, folder: Path, **options: Any) -> None:
        real(self, folder, **options)
        file = Path(folder) / "model.safetensors"
        whole = load_file(file)
        whole[last(whole)].zero_()
        save_file(whole, file, metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    return iter(())


@pytest.mark.parametrize("level", ["full", "files"])
def test_a_model_that_is_not_what_was_trained_is_never_done_and_is_kept_aside(
    tmp_path: Path, tiny_model_dir: Path, harmed: None, level: str
) -> None:
    with pytest.raises(CheckpointError, match="has other values than were trained") as refused:
        trained(tmp_path, f"checkpoint.verify_export={level}")
    run = RunDir(tmp_path / "smoke")
    assert not run.model.exists()
    assert (run.path / "model-refused" / "model.safetensors").is_file()
    assert not (run.path / "model-refused" / "DONE").exists()
    assert "model-refused" in str(refused.value)
    assert run.read_status()["state"] == "failed"


@pytest.mark.parametrize("printed", ["", "echo loading"], ids=["silent", "after a library has printed"])
def test_a_process_that_dies_with_its_verdict_leaves_the_model_to_be_looked_at_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, printed: str
) -> None:
    from sft_dist.train import publish

    run = RunDir(tmp_path)
    dying = tmp_path / "python"
    dying.write_text(f"#!/bin/sh\n{printed}\nexit 1\n")
    dying.chmod(0o755)
    monkeypatch.setattr(publish.sys, "executable", str(dying))
    with pytest.raises(CheckpointError, match="ended with status 1 and no verdict") as refused:
        publish._prove(run, model)
    assert f"-m sft_dist.evaluate.prove {run.path / 'model-refused'}" in str(refused.value)
    assert prove(run.path / "model-refused")
