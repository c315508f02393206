"""LoRA in one process: what is trained and what is not, what is saved and published, and what is refused."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_dist import stages
from sft_dist.config.loader import load_run_config
from sft_dist.data.template import CHATML_TOKENS
from sft_dist.errors import ConfigError, PreflightError, RunStopped
from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import settle
from sft_dist.train.__main__ import main
from sft_dist.train.merging import rounded

pytest.importorskip("peft", reason="needs the package peft, not installed here (make setup)")

NewRun = Callable[..., RunDir]
# 24 rows, 8 a step: three steps an epoch.
SMALL = (
    "data.train.sample=24",
    "data.eval_size=0",
    "train.eval_strategy=no",
    "train.max_steps=6",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
    "model.dtype=float32",
)
LORA = "model.lora={r: 4}"
ENDS = ("lm_head.weight", "model.embed_tokens.weight")
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes ('sft-dist[qlora]')"
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot takes longer than the training."""
    monkeypatch.setattr(stages, "report_here", lambda run: None)


@pytest.fixture
def trained(new_run: NewRun) -> Callable[..., RunDir]:
    """`trained("model.lora={}", name="a")` trains a small run with these overrides."""

    def train(*overrides: str, name: str = "run") -> RunDir:
        run = new_run(*SMALL, *overrides, name=name)
        run_here(run)
        return run

    return train


@pytest.fixture(scope="session")
def without_chatml(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`without_chatml(tied=False)` is the tiny model whose vocabulary lacks ChatML's tokens; it has no room for them."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    def make(tied: bool) -> Path:
        folder = tmp_path_factory.mktemp("models")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.save_pretrained(folder)
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            text = path.read_text()
            for number, token in enumerate(CHATML_TOKENS):
                text = text.replace(token, f"<|other_{number}|>")
            path.write_text(text)
        settings = LlamaConfig.from_pretrained(tiny_model_dir).to_dict() | {"tie_word_embeddings": tied}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
        return folder

    return make


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_jsonl(run.metrics) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def adapter_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "adapter" / "adapter_model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(3, 60)[None]).logits
    return found


def published(run: RunDir) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.model)


def base_with_adapter(run: RunDir, base: Path) -> Any:
    """As a user of peft would put them together."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    rows = len(AutoTokenizer.from_pretrained(run.model))
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, pad_to_multiple_of=64)
    return PeftModel.from_pretrained(model, run.model / "adapter")


def test_only_the_adapter_learns_and_the_published_model_holds_it(
    trained: Callable[..., RunDir], tiny_model_dir: Path
) -> None:
    run = trained(LORA, "checkpoint.save_strategy=steps", "checkpoint.save_steps=6")
    assert losses(run)[-1] < losses(run)[0] - 0.2
    before, after = weights(tiny_model_dir), weights(run.model)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert torch.allclose(logits(published(run)), logits(base_with_adapter(run, tiny_model_dir)), atol=1e-5)
    kept = {path.name for path in (run.checkpoints / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in kept and "model.safetensors" not in kept
    elements = sum(tensor.numel() for tensor in adapter_of(run).values())
    assert elements * 4 > (run.model / "adapter" / "adapter_model.safetensors").stat().st_size - 8000
    # The adapter, two moments and a few kilobytes of names.
    size = sum(path.stat().st_size for path in (run.checkpoints / "checkpoint-6").iterdir())
    assert size < 3 * 4 * elements + 90_000


def test_the_first_loss_is_that_of_the_base_model(trained: Callable[..., RunDir]) -> None:
    """A new adapter adds nothing; and the loss comes from the same one-pass head, without a gradient for it."""
    runs = [trained(*more, "train.max_steps=1", name=name) for name, more in (("full", ()), ("lora", (LORA,)))]
    assert losses(runs[0]) == losses(runs[1])


def test_a_merged_bfloat16_model_keeps_what_the_adapter_has_learned(
    trained: Callable[..., RunDir], tiny_model_dir: Path
) -> None:
    """Rounded to the nearest, it would keep less: most changes are smaller than half of the step to the next bfloat16."""
    few = ("train.max_steps=2", "train.learning_rate=3e-5")
    run = trained("model.lora={r: 4, lora_alpha: 8}", "model.dtype=bfloat16", *few)
    found, published = adapter_of(run), weights(run.model)
    assert {tensor.dtype for tensor in (*found.values(), *published.values())} == {torch.bfloat16}
    base, kept, nearest = weights(tiny_model_dir), 0.0, 0.0
    whole = 0.0
    for key in found:
        if "lora_A" not in key:
            continue
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        change = 2 * found[key.replace("lora_A", "lora_B")].float() @ found[key].float()
        start = base[name].bfloat16().float()
        exact = start + change
        step = exact.abs() * torch.finfo(torch.bfloat16).eps
        assert ((published[name].float() - exact).abs() <= step).all(), "one of the two neighbours"
        whole += float((change * change).sum())
        kept += float((change * (published[name].float() - start)).sum())
        nearest += float((change * (exact.bfloat16().float() - start)).sum())
    assert kept / whole == pytest.approx(1, abs=0.05)
    assert nearest / whole < 0.8, "or this test says nothing"


def test_rounding_by_chance_is_right_on_average_and_the_same_each_time() -> None:
    exact = torch.tensor([1.0, 1 + 2**-9, -(1 + 3 * 2**-9), 0.0, -2.5, float("inf"), float("nan"), 1e-40])
    many = exact[:, None].repeat(1, 40_000)
    found = rounded(many, "a").float()
    assert torch.equal(found.nan_to_num(), rounded(many, "a").float().nan_to_num())
    assert not torch.equal(found[1], rounded(many, "b").float()[1]), "another tensor, another chance"
    assert found[1].unique().tolist() == [1.0, 1 + 2**-7]
    assert found[2].unique().tolist() == [-(1 + 2**-7), -1.0]
    assert found[1:3].mean(1).tolist() == pytest.approx(exact[1:3].tolist(), abs=2**-7 / 40)
    for row in (0, 3, 4, 5):
        assert (found[row] == exact[row]).all(), "what bfloat16 can hold stays"
    assert found[6].isnan().all()
    assert float(found[7].max()) < 1e-38


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "none"), ("bfloat16", "none"), pytest.param("float32", "nf4", marks=needs_bitsandbytes)],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    trained: Callable[..., RunDir], new_run: NewRun, signal_at: Callable[..., None], dtype: str, quantization: str
) -> None:
    lora = f"model.lora={{r: 4, lora_dropout: 0.1, quantization: {quantization}}}"
    settings = (lora, f"model.dtype={dtype}", "train.gradient_checkpointing=true")
    whole = trained(*settings, name="whole")
    stopped = new_run(*SMALL, *settings, name="stopped")
    signal_at(2, signal.SIGTERM)
    with pytest.raises(RunStopped):
        run_here(stopped)
    run_here(stopped)
    assert losses(stopped) == losses(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(stopped).items())


def test_without_merging_only_the_adapter_is_published_and_the_run_can_still_be_asked(
    trained: Callable[..., RunDir], tiny_model_dir: Path
) -> None:
    from sft_dist.evaluate.compare import load_for
    from sft_dist.train.settle import resolve_here

    run = trained(
        "model.lora={r: 4, merge: false}", "evaluate.before=true", "evaluate.after=true", "evaluate.questions=[Hi]"
    )
    assert not list(run.model.glob("*.safetensors"))
    assert [len(read_jsonl(run.eval / f"{when}.jsonl")) for when in ("before", "after")] == [1, 1]
    config = load_run_config(run.config)
    loaded = load_for(config, run, resolve_here(config), "after")
    assert torch.allclose(logits(loaded.model), logits(base_with_adapter(run, tiny_model_dir)), atol=1e-6)
    base = load_for(config, run, resolve_here(config), "before")
    assert not torch.allclose(logits(loaded.model), logits(base.model), atol=1e-3)
    assert "PeftModel.from_pretrained" in (run.model / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_are_trained_and_no_other_rows(
    trained: Callable[..., RunDir], without_chatml: Callable[[bool], Path], tied: bool
) -> None:
    base = without_chatml(tied)
    run = trained(LORA, f"model.name={base}", "model.chat_template=chatml", "train.learning_rate=0.03")
    before, after = weights(base), weights(run.model)
    matrices = [name for name in ENDS if name in before]
    assert len(matrices) == (1 if tied else 2)
    for name in matrices:
        old = before[name].shape[0]
        assert after[name].shape[0] == -(-(old + len(CHATML_TOKENS)) // 64) * 64
        assert torch.equal(after[name][:old], before[name])
        rows = next(tensor for key, tensor in adapter_of(run).items() if name.removesuffix("weight") in key)
        assert torch.equal(after[name][old : old + len(CHATML_TOKENS)], rows)
        # transformers starts them at the mean of the others.
        assert (rows - before[name].mean(0)).abs().max() > 0.05
    # Rows beyond the tokens only fill the matrix: no row of data holds them.
    used = old + len(CHATML_TOKENS)
    assert torch.allclose(
        logits(published(run))[..., :used], logits(base_with_adapter(run, base))[..., :used], atol=1e-5
    )
    assert all(tensor.shape[0] < before[matrices[0]].shape[0] for tensor in adapter_of(run).values())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trls_own_loss_trains_new_tokens_too(
    trained: Callable[..., RunDir], without_chatml: Callable[[bool], Path], tied: bool
) -> None:
    base = without_chatml(tied)
    run = trained(LORA, f"model.name={base}", "model.chat_template=chatml", "train.extra={loss_type: dft}")
    rows = [tensor for name, tensor in adapter_of(run).items() if "lora_" not in name]
    means = [tensor.mean(0) for name, tensor in weights(base).items() if name in ENDS]
    assert all((row - mean).abs().max() > 0.005 for row, mean in zip(rows, means, strict=True))


def test_a_tied_matrix_that_is_trained_whole_stays_one(trained: Callable[..., RunDir], tiny_model_dir: Path) -> None:
    run = trained("model.lora={r: 4, modules_to_save: [embed_tokens]}")
    model = published(run)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, weights(tiny_model_dir)["model.embed_tokens.weight"])
    assert torch.allclose(logits(model), logits(base_with_adapter(run, tiny_model_dir)), atol=1e-5)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_name_that_no_layer_has_is_refused_before_the_run_exists(new_run: NewRun, tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"model.lora.{field} holds 'q_prj'") as refused:
        new_run(f"model.lora={{{field}: [q_prj]}}")
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj" in str(refused.value.hint)
    assert not (tmp_path / "runs").exists()


def test_fsdp2_refuses_new_tokens_of_a_tied_model(new_run: NewRun, without_chatml: Callable[[bool], Path]) -> None:
    plan = ("parallel.plan=fsdp2", "parallel.num_processes=2")
    with pytest.raises(ConfigError, match="tied to them: plan fsdp2 cannot"):
        new_run(LORA, f"model.name={without_chatml(True)}", "model.chat_template=chatml", *plan)
    new_run(LORA, f"model.name={without_chatml(False)}", "model.chat_template=chatml", *plan)


@pytest.mark.parametrize(
    ("missing", "lora", "command"),
    [
        ("peft", "{}", "pip install 'sft-dist[lora]'"),
        ("bitsandbytes", "{quantization: nf4}", "pip install 'sft-dist[qlora]'"),
    ],
)
def test_a_missing_package_is_named_before_the_run_exists(
    new_run: NewRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    lora: str,
    command: str,
) -> None:
    monkeypatch.setattr(settle, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(PreflightError, match=f"the package {missing} is not installed") as refused:
        new_run(f"model.lora={lora}")
    assert command in str(refused.value.hint)
    # A launcher's worker has no such command before it: it says so itself, before it makes the run.
    Path("mine.yaml").write_text(f"extends: smoke\nmodel: {{lora: {lora}}}\n")
    assert main(["mine.yaml"]) == 3
    assert f"the package {missing} is not installed" in capsys.readouterr().err
    assert not Path("runs/mine").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_are_trained_on_and_whole_weights_published(
    trained: Callable[..., RunDir], tiny_model_dir: Path, dtype: str
) -> None:
    run = trained("model.lora={r: 4, quantization: nf4}", f"model.dtype={dtype}")
    assert losses(run)[-1] < losses(run)[0] - 0.2
    found, name = adapter_of(run), "model.layers.0.self_attn.q_proj"
    a, b = (found[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    computing = getattr(torch, dtype)
    exact = weights(tiny_model_dir)[f"{name}.weight"].to(computing).float() + 32 / 4 * b @ a
    step = exact.abs() * (torch.finfo(computing).eps if dtype == "bfloat16" else 0)
    assert ((weights(run.model)[f"{name}.weight"].float() - exact).abs() <= step).all()
    assert "before the rounding to 4 bits" in (run.model / "README.md").read_text()


@needs_bitsandbytes
def test_an_adapter_to_four_bits_is_asked_beside_four_bits(trained: Callable[..., RunDir]) -> None:
    from bitsandbytes.nn import Linear4bit

    from sft_dist.evaluate.compare import load_for
    from sft_dist.train.settle import resolve_here

    run = trained("model.lora={r: 4, quantization: nf4, merge: false}")
    config = load_run_config(run.config)
    for when in ("before", "after"):
        model = load_for(config, run, resolve_here(config), when).model  # type: ignore[arg-type]
        assert any(isinstance(module, Linear4bit) for module in model.modules())
