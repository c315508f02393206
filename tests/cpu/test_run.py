"""Whole runs on the tiny model: what they leave behind, what their settings do, and how they refuse and fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.errors import DataError
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import damage

NewRun = Callable[..., RunDir]
CallCli = Callable[..., int]
SignalAt = Callable[..., None]

# 24 rows, 8 a step in two micro batches, three epochs: nine steps, the epochs end with steps 3, 6 and 9.
SMALL = (
    "data.train.sample=24",
    "data.eval_size=0",
    "train.eval_strategy=no",
    "train.max_steps=null",
    "train.num_train_epochs=3",
    "train.per_device_train_batch_size=4",
    "checkpoint.save_strategy=no",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
)


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_jsonl(run.metrics) if "loss" in row]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def write_rows(path: Path, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
UNANSWERED = {"messages": [{"role": "user", "content": "Hi"}]}


# --- the command, as CI calls it -------------------------------------------------------------------------------------


def test_smoke_ends_done_with_every_file_of_the_contract(run_cli, tmp_path: Path, tiny_model_dir: Path) -> None:
    ended = run_cli("train", "smoke")
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    run = RunDir(tmp_path / "runs" / "smoke")
    status = run.read_status()
    assert (status["state"], status["step"], status["max_steps"], status["attempt"]) == ("done", 10, 10, 1)
    assert status["reason"] is None
    files = [
        "config.yaml", "provenance.json", "env.json", "status.json", "attempts.jsonl", "metrics.jsonl", "scores.json",
        "data/ledger.json", "eval/before.jsonl", "eval/after.jsonl", "model/model.safetensors", "model/config.json",
        "model/tokenizer.json", "model/DONE", "report.html", "loss.png",
    ]  # fmt: skip
    assert [name for name in files if not (run.path / name).is_file()] == []
    assert [step for step, _ in losses(run)] == list(range(1, 11))
    values = [loss for _, loss in losses(run)]
    assert values[-1] < values[0] - 1, "the loss did not fall"
    assert any("eval_loss" in row for row in read_jsonl(run.metrics))
    assert all(damage(path) is None for _, path in list_checkpoints(run))
    assert str(Path("runs", "smoke", "report.html")) in ended.stdout
    assert not [path for path in run.path.rglob(".*") if path.is_file() and path.name != ".lock"], (
        "a temporary file was left behind"
    )


def test_the_model_card_names_what_it_was_trained_from(new_run: NewRun) -> None:
    run = new_run(*SMALL, "train.max_steps=1")
    run_here(run)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert "tiny" in card


# --- refused, failed -------------------------------------------------------------------------------------------------


def one_screen(text: str) -> None:
    assert "Traceback" not in text
    assert 0 < len(text.strip().splitlines()) <= 24


def test_an_existing_run_is_refused_with_three_choices(new_run: NewRun, call_cli: CallCli, capsys: Any) -> None:
    run = new_run(*SMALL)
    status = run.status.read_bytes()
    assert call_cli("train", "smoke", "run.name=run", f"run.dir={run.path.parent}") == 2
    errors = capsys.readouterr().err
    one_screen(errors)
    for choice in (f"sft-dist resume {run.path}", "run.name=", "--overwrite"):
        assert choice in errors
    assert run.status.read_bytes() == status


def test_overwrite_replaces_the_run(new_run: NewRun, call_cli: CallCli) -> None:
    run = new_run(*SMALL, "train.max_steps=2")
    run_here(run)
    (run.path / "mark").write_text("old")
    options = ("run.name=run", f"run.dir={run.path.parent}", *SMALL, "train.max_steps=1")
    assert call_cli("train", "smoke", "--overwrite", *options) == 0
    assert not (run.path / "mark").exists()
    assert [step for step, _ in losses(run)] == [1]
    assert len(read_jsonl(run.attempts)) == 1


def test_a_done_run_is_not_resumed(new_run: NewRun, call_cli: CallCli, capsys: Any) -> None:
    run = new_run(*SMALL, "train.max_steps=1")
    run_here(run)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert call_cli("resume", run.path) == 2
    assert "is done" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_an_unknown_run_is_refused(call_cli: CallCli, capsys: Any) -> None:
    assert call_cli("resume", "nobody") == 2
    assert "no run named 'nobody'" in capsys.readouterr().err


def test_the_worker_takes_a_config_too(tmp_path: Path, tiny_model_dir: Path) -> None:
    from sft_dist.train.__main__ import main

    (tmp_path / "mine.yaml").write_text(
        "extends: smoke\ntrain: {max_steps: 1, eval_strategy: 'no'}\ndata: {eval_size: 0}\n", encoding="utf-8"
    )
    assert main(["mine.yaml"]) == 0
    run = RunDir(tmp_path / "runs" / "mine")
    assert run.read_status()["state"] == "done"
    assert main([]) == main(["--help"]) == main(["a", "b"]) == 2


# Runs the worker as `python -m sft_dist.train` does, and says what its process is like while it trains.
WATCHED = """
import gc, json, runpy, sys
def say(self, row, shown=[]):
    if not shown:
        absent = [name for name in ("bitsandbytes", "wandb") if sys.modules.get(name) is None]
        print(json.dumps({"absent": absent, "collects": gc.get_threshold() == usual, "frozen": gc.get_freeze_count()}))
        shown.append(row)
usual = gc.get_threshold()
from sft_dist.train.progress import Progress
Progress.metrics = say
sys.argv = ["-m", sys.argv[1]]
runpy.run_module("sft_dist.train", run_name="__main__")
"""


def test_the_worker_imports_only_what_its_run_uses(new_run: NewRun) -> None:
    run = new_run(*SMALL, "train.max_steps=1")
    words = [sys.executable, "-c", WATCHED, str(run.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert found["absent"] == ["bitsandbytes", "wandb"]
    assert found["collects"], "garbage would pile up while it trains"
    assert found["frozen"] > 100_000, "it is looked through again and again"


def test_the_worker_leaves_a_done_run_alone(new_run: NewRun) -> None:
    from sft_dist.train.__main__ import main

    run = new_run(*SMALL, "train.max_steps=2")
    assert main([str(run.path)]) == 0
    kept = [run.model / "model.safetensors", run.model / "DONE", run.metrics]
    before = [path.read_bytes() for path in kept]
    main([str(run.path)])
    assert run.read_status()["state"] == "done", "a second start turned a finished run into a failed one"
    assert [path.read_bytes() for path in kept] == before, "a finished run was trained again"


def test_the_worker_gives_the_exit_status_of_the_error(new_run: NewRun, tmp_path: Path, signal_at: SignalAt) -> None:
    from sft_dist.train.__main__ import main

    assert main([str(new_run(*SMALL, "model.name=./nowhere", name="a", proved=False).path)]) == 3
    assert main([str(new_run(*SMALL, "data.train=none.jsonl", name="b", proved=False).path)]) == 4
    signal_at(2, signal.SIGTERM)
    assert main([str(new_run(*SMALL, name="c").path)]) == 75


BAD_DATA = {
    "no such file": (None, "there is no file rows.jsonl"),
    "empty file": ("", "rows.jsonl holds no rows"),
    "only blank lines": ("\n\n", "rows.jsonl holds no rows"),
    "no answer": (f"{json.dumps(GOOD)}\n{json.dumps(UNANSWERED)}\n", "rows.jsonl:2: has no assistant message"),
    "not JSON": (f"{json.dumps(GOOD)}\n\n{{oops\n", "rows.jsonl:3: "),
}


@pytest.mark.parametrize(("content", "told"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_data_that_cannot_be_used_is_one_clear_screen_and_exit_4(
    call_cli: CallCli, capsys: Any, tmp_path: Path, content: str | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    assert call_cli("train", "smoke", "run.name=run", *SMALL, "data.train=rows.jsonl") == 4
    errors = capsys.readouterr().err
    one_screen(errors)
    assert told in errors
    assert not (tmp_path / "runs").exists(), "a name is taken by a run that could never start"


@pytest.mark.parametrize("field", ["data.train", "data.eval", "evaluate.data"])
def test_bad_rows_are_found_before_the_base_model_is_asked(
    call_cli: CallCli, capsys: Any, tmp_path: Path, field: str
) -> None:
    """Asking takes minutes on a real model; a mistake in a file should not wait for it."""
    write_rows(tmp_path / "rows.jsonl", GOOD, UNANSWERED)
    asking = ("evaluate.before=true", 'evaluate.questions=["Hi?"]')
    assert call_cli("train", "smoke", "run.name=run", *SMALL, *asking, f"{field}=rows.jsonl") == 4
    assert "rows.jsonl:2: has no assistant message" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_overwrite_with_data_that_cannot_be_used_keeps_the_old_run(new_run: NewRun, call_cli: CallCli) -> None:
    run = new_run(*SMALL)
    options = ("run.name=run", f"run.dir={run.path.parent}", *SMALL, "data.train=none.jsonl")
    assert call_cli("train", "smoke", "--overwrite", *options) == 4
    assert run.config.is_file()


def test_rows_that_went_bad_since_are_on_record_and_the_run_resumes_once_they_are_good(
    new_run: NewRun, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *[GOOD] * 24)
    run = new_run(*SMALL, f"data.train={rows}")
    write_rows(rows, *[GOOD] * 5, UNANSWERED, *[GOOD] * 18)
    with pytest.raises(DataError, match=r"rows\.jsonl:6: has no assistant message"):
        run_here(run)
    assert run.read_status()["state"] == "failed"
    (attempt,) = read_jsonl(run.attempts)
    assert attempt["ended"] == "failed"
    for reason in (attempt["reason"], run.read_status()["reason"]):
        assert "rows.jsonl:6" in reason, "the reason on record does not say which row"
    write_rows(rows, *[GOOD] * 24)
    run_here(run)
    assert (run.read_status()["state"], run.read_status()["reason"]) == ("done", None)
    assert [row["ended"] for row in read_jsonl(run.attempts)] == ["failed", "done"]


def test_an_unexpected_failure_is_on_record_too(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.train import trainer

    def fall_over(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of cheese\nand more lines")

    monkeypatch.setattr(trainer.Trainer, "compute_loss", fall_over)
    run = new_run(*SMALL)
    with pytest.raises(RuntimeError, match="out of cheese"):
        run_here(run)
    assert run.read_status()["state"] == "failed"
    assert run.read_status()["reason"] == "RuntimeError: out of cheese"
    assert read_jsonl(run.attempts)[0]["reason"] == "RuntimeError: out of cheese"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere"])
def test_a_missing_model_is_one_clear_screen_and_exit_3(call_cli: CallCli, capsys: Any, name: str) -> None:
    assert call_cli("train", "smoke", *SMALL, f"model.name={name}") == 3
    errors = capsys.readouterr().err
    one_screen(errors)
    assert "model.name" in errors
    assert name in errors


def test_a_folder_without_a_model_is_exit_3(call_cli: CallCli, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert call_cli("train", "smoke", *SMALL, "model.name=./empty") == 3
    one_screen(capsys.readouterr().err)


def test_a_hub_model_without_network_is_one_clear_screen_and_exit_3(run_cli, tiny_model_dir: Path) -> None:
    ended = run_cli("train", "smoke", *SMALL, "model.name=nobody/no-such-model", env={"HF_HUB_OFFLINE": "1"})
    assert ended.returncode == 3
    one_screen(ended.stderr)
    assert "model.name is 'nobody/no-such-model'" in ended.stderr
    for noise in ("Warning", "Retrying", "HTTP", "thrown while"):
        assert noise not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("label", ["''", "'  '"])
def test_a_label_of_nothing_is_exit_2_before_anything_runs(
    call_cli: CallCli, capsys: Any, tmp_path: Path, label: str
) -> None:
    assert call_cli("train", "smoke", f"evaluate.labels=[refund, {label}]") == 2
    errors = capsys.readouterr().err
    one_screen(errors)
    assert "evaluate.labels" in errors
    assert not (tmp_path / "runs").exists()


def test_an_expected_answer_outside_of_the_labels_is_exit_4(call_cli: CallCli, capsys: Any) -> None:
    options = ("evaluate.before=true", "evaluate.data={task: tickets, rows: 2}", "evaluate.labels=[yes, no]")
    assert call_cli("train", "smoke", *SMALL, *options) == 4
    errors = capsys.readouterr().err
    one_screen(errors)
    assert "evaluate.labels" in errors


def test_an_explicit_gpu_plan_without_a_gpu_is_exit_2(call_cli: CallCli, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert call_cli("train", "smoke", *SMALL, "parallel.plan=single") == 2
    one_screen(capsys.readouterr().err)


def test_the_command_under_a_launcher_is_refused(
    call_cli: CallCli, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert call_cli("train", "smoke", *SMALL) == 2
    errors = capsys.readouterr().err
    one_screen(errors)
    assert "-m sft_dist.train" in errors
    assert not (tmp_path / "runs").exists()


def test_settings_that_trl_refuses_are_exit_2(call_cli: CallCli, capsys: Any) -> None:
    assert call_cli("train", "smoke", *SMALL, "train.extra={neftune_noise_alpha: -1, loss_type: nonsense}") == 2
    one_screen(capsys.readouterr().err)


def test_debug_shows_the_traceback(run_cli, tiny_model_dir: Path) -> None:
    ended = run_cli("--debug", "resume", "nobody")
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr


# --- what the settings do ------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_train_like_one_batch(new_run: NewRun) -> None:
    """Trained tokens, not micro batches, weigh the same."""
    options = (*SMALL, "model.dtype=float32", "data.train.task=mix", "train.max_steps=4")
    one, four = (new_run(*options, f"train.per_device_train_batch_size={n}", name=f"n{n}") for n in (8, 2))
    run_here(one)
    run_here(four)
    assert [loss for _, loss in losses(four)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_or_not_the_losses_are_the_same(new_run: NewRun, dtype: str) -> None:
    options = (*SMALL, f"model.dtype={dtype}", "train.max_steps=4", "train.max_grad_norm=0")
    joined, padded = (
        new_run(*options, f"model.attn_implementation={name}", name=name) for name in ("sft_dist_varlen", "sdpa")
    )
    run_here(joined)
    run_here(padded)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert [loss for _, loss in losses(joined)] == pytest.approx([loss for _, loss in losses(padded)], rel=tolerance)
    tokens = [[row["tokens"] for row in read_jsonl(run.metrics) if "tokens" in row] for run in (joined, padded)]
    assert tokens[0] == tokens[1], "padding was counted as tokens"


def test_the_settings_reach_the_optimizer(new_run: NewRun) -> None:
    changes = ("train.weight_decay=0.25", "train.adam_beta1=0.7", "train.adam_beta2=0.9", "train.adam_epsilon=1e-6")
    for dtype in ("float32", "bfloat16"):
        run = new_run(*SMALL, f"model.dtype={dtype}", *changes, "checkpoint.save_strategy=epoch", name=dtype)
        run_here(run)
        newest = list_checkpoints(run)[0][1]
        groups = torch.load(newest / "optimizer.pt", weights_only=True)["param_groups"]
        assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.25]
        for group in groups:
            assert tuple(group["betas"]) == (0.7, 0.9)
            assert group["eps"] == 1e-6
        states = torch.load(newest / "optimizer.pt", weights_only=True)["state"].values()
        assert all(value.dtype == torch.float32 for state in states for value in state.values())
        assert all(tensor.dtype == getattr(torch, dtype) for tensor in weights(run).values())


# --- what is on record -----------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_written(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_5ecretsecretsecret", "WANDB_API_KEY": "5ecret" * 7, "AWS_SECRET_ACCESS_KEY": "aws5ecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = new_run(*SMALL, "train.max_steps=1", "checkpoint.save_strategy=epoch")
    run_here(run)
    leaked = [path for path in run.path.rglob("*") if path.is_file() and b"5ecret" in path.read_bytes()]
    assert leaked == []


def test_the_environment_and_the_decisions_are_on_record(new_run: NewRun) -> None:
    run = new_run(*SMALL, "train.max_steps=1", "train.per_device_train_batch_size=auto", "model.dtype=auto")
    run_here(run)
    env = read_json(run.env)
    assert (
        env["versions"]["torch"] == torch.__version__.partition("+")[0] or env["versions"]["torch"] == torch.__version__
    )
    assert {"trl", "transformers", "datasets"} <= env["versions"].keys()
    assert env["resolved"]["plan"] == "cpu"
    assert any(line.startswith("model.dtype = ") for line in env["decisions"])


def test_metrics_rows_hold_what_the_report_reads(new_run: NewRun) -> None:
    run = new_run(*SMALL, "train.max_steps=3")
    run_here(run)
    rows = [row for row in read_jsonl(run.metrics) if "loss" in row]
    for row in rows:
        assert {"time", "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s"} <= row.keys()
    ledger = read_json(run.ledger)["train"]
    assert ledger["rows"] == 24
    assert rows[-1]["tokens"] == ledger["tokens"], "three steps of eight rows are all 24 rows"


def test_the_published_model_answers_like_the_trained_one(new_run: NewRun) -> None:
    """model/ loads with plain transformers, with its template and its end-of-turn token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = new_run(*SMALL, "checkpoint.save_strategy=epoch")
    run_here(run)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    newest = load_file(list_checkpoints(run)[0][1] / "model.safetensors")
    assert all(torch.equal(tensor, newest[name]) for name, tensor in weights(run).items())
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template
    eos = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (eos if isinstance(eos, list) else [eos])
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
