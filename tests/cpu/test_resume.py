"""A run that is stopped, killed or damaged goes on as if nothing had happened: the same losses, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_dist import stages
from sft_dist.errors import CheckpointError, RunStopped
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import damage

NewRun = Callable[..., RunDir]
CallCli = Callable[..., int]
SignalAt = Callable[..., None]
INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1

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
STEPS = 9


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_jsonl(run.metrics) if "loss" in row]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def assert_same_weights(run: RunDir, other: RunDir) -> None:
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def write_rows(path: Path, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot takes longer than the training."""
    monkeypatch.setattr(stages, "report_here", lambda run: None)


DRIVER = """
import os, signal, sys
from sft_dist.train.progress import Progress
step, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
shown = Progress.metrics
def metrics(self, row):
    shown(self, row)
    if row["step"] == step:
        os.kill(os.getpid(), number)
Progress.metrics = metrics
from sft_dist.cli import main
main()
"""


def train_and_signal(step: int, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sft-dist train ...` in a process of its own that gets the signal once `step` stands in metrics.jsonl."""
    command = [sys.executable, "-c", DRIVER, str(step), str(number), "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_a_killed_run_resumes_from_its_last_checkpoint_by_the_worker_alone(
    new_run: NewRun, tmp_path: Path, tiny_model_dir: Path
) -> None:
    saving = (*SMALL, "model.dtype=float32", "checkpoint.save_strategy=steps", "checkpoint.save_steps=2")
    whole = new_run(*saving, name="whole")
    run_here(whole)
    run = RunDir(tmp_path / "runs" / "killed")
    ended = train_and_signal(7, signal.SIGKILL, "smoke", "run.name=killed", f"run.dir={run.path.parent}", *saving)
    assert ended.returncode == -signal.SIGKILL
    assert run.read_status()["state"] == "running", "a killed process cannot say how it ended"
    assert losses(run) == losses(whole)[:7]
    complete = [step for step, path in list_checkpoints(run) if damage(path) is None]
    assert complete[0] == 6

    # The worker alone, as a launcher starts it.
    command = [sys.executable, "-m", "sft_dist.train", str(run.path)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoint-6" in again.stderr
    assert losses(run) == losses(whole), "metrics.jsonl has other losses, or a step twice"
    assert_same_weights(run, whole)
    assert run.read_status()["state"] == "done"
    assert read_jsonl(run.attempts)[-1]["first_step"] == 6


def wait_for_step(run: RunDir, step: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 300
    while max((row.get("step", 0) for row in read_jsonl(run.metrics)), default=0) < step:
        assert process.poll() is None, "the run ended before it got that far"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_from_outside_stops_the_command_with_75(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = RunDir(tmp_path / "runs" / "long")
    endless = [f"run.dir={run.path.parent}", "run.name=long", *SMALL, "train.max_steps=1000000"]
    command = [sys.executable, "-m", "sft_dist", "train", "smoke", *endless]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        wait_for_step(run, 3, process)
        process.send_signal(TERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert f"sft-dist resume {run.path}" in errors
    step = run.read_status()["step"]
    assert run.read_status()["state"] == "stopped"
    assert [(found, damage(path)) for found, path in list_checkpoints(run)] == [(step, None)]


# --- stopped and resumed: the same losses, bit for bit ---------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str], tiny_model_dir: Path
) -> Callable[[str], RunDir]:
    """`straight("float32")`: a run that nobody interrupted, made once for each type."""
    from sft_dist.config.loader import load_config
    from sft_dist.stages import new_run

    made: dict[str, RunDir] = {}

    def make(dtype: str) -> RunDir:
        if dtype not in made:
            folder = tmp_path_factory.mktemp("straight")
            loaded = load_config("smoke", [f"run.dir={folder}", "run.name=whole", f"model.dtype={dtype}", *SMALL])
            made[dtype] = new_run(loaded)
            run_here(made[dtype])
        return made[dtype]

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("number", "step"), [(INT, 2), (TERM, 4)], ids=["SIGINT-epoch-end", "SIGTERM-mid-epoch"])
def test_a_stopped_run_resumes_to_the_same_losses_and_weights(
    new_run: NewRun, straight: Callable[[str], RunDir], signal_at: SignalAt, dtype: str, number: int, step: int
) -> None:
    run = new_run(*SMALL, f"model.dtype={dtype}")
    signal_at(step, number)
    with pytest.raises(RunStopped):
        run_here(run)
    status = run.read_status()
    assert status["state"] == "stopped"
    assert status["step"] == step + 1, "a step is logged after its end, so the next one's end honours the signal"
    assert signal.Signals(number).name in status["reason"]
    stopped_at = status["step"]
    assert [(found, damage(path)) for found, path in list_checkpoints(run)] == [(stopped_at, None)]
    assert losses(run) == losses(straight(dtype))[:stopped_at]
    assert not run.model.exists()

    run_here(run)
    assert losses(run) == losses(straight(dtype))
    assert len(losses(run)) == STEPS
    assert_same_weights(run, straight(dtype))
    attempts = read_jsonl(run.attempts)
    assert [row["ended"] for row in attempts] == ["stopped", "done"]
    assert [(row["first_step"], row["last_step"]) for row in attempts] == [(0, stopped_at), (stopped_at, STEPS)]
    assert run.read_status()["state"] == "done"


def test_a_run_stopped_twice_resumes_twice(
    new_run: NewRun, straight: Callable[[str], RunDir], signal_at: SignalAt
) -> None:
    run = new_run(*SMALL, "model.dtype=float32")
    for step in (2, 6):
        signal_at(step, TERM)
        with pytest.raises(RunStopped):
            run_here(run)
    run_here(run)
    assert losses(run) == losses(straight("float32"))
    assert_same_weights(run, straight("float32"))
    tokens = [row["tokens"] for row in read_jsonl(run.metrics) if "tokens" in row]
    assert tokens == [row["tokens"] for row in read_jsonl(straight("float32").metrics) if "tokens" in row]


def test_dropout_goes_on_with_the_random_numbers_that_it_had(
    new_run: NewRun, signal_at: SignalAt, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "with-dropout"
    shutil.copytree(tiny_model_dir, folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}), encoding="utf-8")
    options = (*SMALL, "model.dtype=float32", f"model.name={folder}")
    whole, again, run = (new_run(*options, name=name) for name in ("whole", "again", "run"))
    run_here(whole)
    run_here(again)
    assert losses(again) == losses(whole), "the same run twice gives other losses"
    signal_at(4, TERM)
    with pytest.raises(RunStopped):
        run_here(run)
    run_here(run)
    assert losses(run) == losses(whole)
    assert_same_weights(run, whole)


def test_a_stop_between_two_log_events_loses_no_loss(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of every optimizer step is in exactly one row: rows at 1, 3, 6, 9, and a stop at step 5."""
    from sft_dist.train.callbacks import RunRecorder

    options = (*SMALL, "model.dtype=float32", "train.logging_steps=3")
    each, run = new_run(*SMALL, "model.dtype=float32", name="each"), new_run(*options)
    run_here(each)
    ended = RunRecorder.on_step_end

    def on_step_end(self: RunRecorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and self.first_step == 0:
            os.kill(os.getpid(), TERM)
        ended(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunRecorder, "on_step_end", on_step_end)
    with pytest.raises(RunStopped):
        run_here(run)
    run_here(run)
    single, previous = dict(losses(each)), 0
    for step, value in losses(run):
        mean = sum(single[number] for number in range(previous + 1, step + 1)) / (step - previous)
        assert value == pytest.approx(mean, rel=1e-5), f"the row of step {step} is not the mean since step {previous}"
        previous = step


def test_a_stop_saves_once_and_does_not_evaluate(
    new_run: NewRun, signal_at: SignalAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time between a cluster's warning and its kill is short: nothing but one save may use it."""
    from sft_dist.train import saving

    manifests: list[str] = []
    seal = saving.seal
    monkeypatch.setattr(saving, "seal", lambda folder, *rest: (manifests.append(folder.name), seal(folder, *rest))[1])
    epochs = ("checkpoint.save_strategy=epoch", "train.eval_strategy=epoch", "data.eval_size=8", "data.train.sample=32")
    run = new_run(*SMALL, *epochs)
    signal_at(1, TERM)
    with pytest.raises(RunStopped):
        run_here(run)
    step = run.read_status()["step"]
    assert step < 3, "the stop was not in the middle of an epoch"
    assert manifests == [f"checkpoint-{step}"], "the checkpoint was written more than once"
    assert not [row for row in read_jsonl(run.metrics) if "eval_loss" in row], "a stopping run evaluated first"


def test_two_interrupts_leave_at_once(new_run: NewRun, call_cli: CallCli, signal_at: SignalAt, capsys: Any) -> None:
    run = new_run(*SMALL)
    signal_at(3, INT, INT)
    assert call_cli("resume", run.path) == 75
    assert run.read_status()["state"] == "stopped"
    assert "twice" in run.read_status()["reason"]
    assert list_checkpoints(run) == [], "it saved although it was told twice to leave"
    assert f"sft-dist resume {run.path}" in capsys.readouterr().err
    assert call_cli("resume", run.path) == 0
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))


def test_a_second_sigterm_does_not_spoil_the_save(new_run: NewRun, signal_at: SignalAt) -> None:
    run = new_run(*SMALL)
    signal_at(3, TERM, TERM, USR1)
    with pytest.raises(RunStopped, match="SIGTERM"):
        run_here(run)
    ((_, path),) = list_checkpoints(run)
    assert damage(path) is None


def test_signals_are_handled_as_before_once_the_run_is_over(new_run: NewRun) -> None:
    before = [signal.getsignal(number) for number in (INT, TERM, USR1)]
    run_here(new_run(*SMALL, "train.max_steps=1"))
    assert [signal.getsignal(number) for number in (INT, TERM, USR1)] == before


ASKING = ("evaluate.before=true", "evaluate.after=true", 'evaluate.questions=["Hi?"]')


@pytest.mark.parametrize("number", [INT, TERM], ids=lambda number: number.name)
def test_a_signal_while_the_base_model_is_asked_stops_the_run(
    new_run: NewRun, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from sft_dist.evaluate import generate

    run = new_run(*SMALL, *ASKING)
    real = generate.generate

    def interrupted(*args: Any, **kwargs: Any) -> list[str]:
        os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(generate, "generate", interrupted)
    assert call_cli("resume", run.path) == 75
    assert run.read_status()["state"] == "stopped"
    assert not (run.eval / "before.jsonl").exists()
    monkeypatch.setattr(generate, "generate", real)
    assert call_cli("resume", run.path) == 0
    assert [row["ended"] for row in read_jsonl(run.attempts)] == ["stopped", "done"]
    assert [len(read_jsonl(run.eval / f"{when}.jsonl")) for when in ("before", "after")] == [1, 1]


def test_a_signal_during_the_last_step_stops_before_the_tuned_model_is_asked(
    new_run: NewRun, call_cli: CallCli, signal_at: SignalAt
) -> None:
    """What is trained is published; what comes after it is left for the resume."""
    run = new_run(*SMALL, *ASKING)
    signal_at(STEPS, TERM)
    assert call_cli("resume", run.path) == 75
    assert run.read_status()["state"] == "stopped"
    assert not (run.eval / "after.jsonl").exists()
    assert call_cli("resume", run.path) == 0
    assert (run.eval / "after.jsonl").is_file()
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1)), "the resume trained again"


@pytest.mark.parametrize("length", ["train.max_steps=5", "train.num_train_epochs=1.5"])
def test_a_run_whose_last_step_is_done_trains_no_more(new_run: NewRun, call_cli: CallCli, length: str) -> None:
    """As one that was killed, or had no room, while its model was published; the last step ends no epoch."""
    run = new_run(*SMALL, length, "train.lr_scheduler_type=constant", "checkpoint.save_strategy=epoch")
    run_here(run)
    before, trained = losses(run), load_file(run.model / "model.safetensors")
    shutil.rmtree(run.model)
    assert call_cli("resume", run.path) == 0
    assert losses(run) == before
    published = load_file(run.model / "model.safetensors")
    assert all(torch.equal(published[name], tensor) for name, tensor in trained.items())


# --- damaged checkpoints, changed data -------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on_from_the_older(
    new_run: NewRun, straight: Callable[[str], RunDir], signal_at: SignalAt, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(*SMALL, "model.dtype=float32", "checkpoint.save_strategy=steps", "checkpoint.save_steps=2")
    signal_at(6, TERM)
    with pytest.raises(RunStopped):
        run_here(run)
    assert [step for step, _ in list_checkpoints(run)] == [7, 6]
    newest = list_checkpoints(run)[0][1]
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    run_here(run)
    assert f"{newest.name}: optimizer.pt has changed" in caplog.text
    assert losses(run) == losses(straight("float32"))
    assert_same_weights(run, straight("float32"))
    assert read_jsonl(run.attempts)[-1]["first_step"] == 6


def test_rotation_keeps_as_many_checkpoints_as_asked(new_run: NewRun) -> None:
    run = new_run(*SMALL, "checkpoint.save_strategy=steps", "checkpoint.save_steps=1", "checkpoint.keep=3")
    run_here(run)
    assert [step for step, _ in list_checkpoints(run)] == [9, 8, 7]
    assert run.read_status()["checkpoint"] == "checkpoint-9"


def test_a_resume_on_other_rows_is_refused(new_run: NewRun, signal_at: SignalAt, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *[GOOD] * 24)
    run = new_run(*SMALL, f"data.train={rows}")
    signal_at(2, TERM)
    with pytest.raises(RunStopped):
        run_here(run)
    write_rows(rows, *[GOOD] * 23, {**GOOD, "messages": [GOOD["messages"][0], {"role": "assistant", "content": "No"}]})
    with pytest.raises(CheckpointError, match="trained with other data"):
        run_here(run)
    assert run.read_status()["state"] == "failed"
    assert len(list_checkpoints(run)) == 1, "the checkpoint of the other rows is gone"


def test_a_new_release_goes_on_with_the_run_of_an_older_one(
    new_run: NewRun, signal_at: SignalAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sft_dist

    run = new_run(*SMALL)
    signal_at(2, TERM)
    with pytest.raises(RunStopped):
        run_here(run)
    monkeypatch.setattr(sft_dist, "__version__", "99.0")
    for name in ("sft_dist.data.prepare", "sft_dist.train.environment"):
        monkeypatch.setattr(f"{name}.__version__", "99.0", raising=False)
    run_here(run)
    assert run.read_status()["state"] == "done"


def test_other_rows_and_another_global_batch_go_on_when_the_user_accepts_it(
    new_run: NewRun, call_cli: CallCli, signal_at: SignalAt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *[GOOD] * 24)
    run = new_run(*SMALL, f"data.train={rows}")
    signal_at(2, TERM)
    with pytest.raises(RunStopped):
        run_here(run)
    stopped = run.read_status()["step"]
    key = read_json(run.ledger)["key"]
    write_rows(rows, {**GOOD, "messages": [GOOD["messages"][0], {"role": "assistant", "content": "No"}]}, *[GOOD] * 23)
    run.config.write_text(run.config.read_text().replace("global_batch_size: 8", "global_batch_size: 16"))
    assert call_cli("resume", run.path) == 5
    told = capsys.readouterr().err
    assert "trained with other data and global_batch_size" in told
    assert "--accept-change" in told
    assert call_cli("resume", run.path, "--accept-change") == 0
    line = read_jsonl(run.attempts)[-1]
    assert (line["ended"], line["first_step"]) == ("done", stopped)
    assert line["accepted_change"] == {
        "data": [key, read_json(run.ledger)["key"]],
        "global_batch_size": [8, 16],
    }
    assert [step for step, _ in losses(run)] == list(range(1, 7)), "three epochs of 24 rows, 16 a step"


def test_the_manifest_says_how_the_checkpoint_was_trained(new_run: NewRun) -> None:
    import torch as installed

    run = new_run(*SMALL, "checkpoint.save_strategy=steps", "checkpoint.save_steps=9")
    run_here(run)
    manifest = read_json(run.checkpoints / "checkpoint-9" / "MANIFEST.json")
    wanted = {"step": 9, "samples": 72, "global_batch_size": 8, "packing": False, "plan": "cpu", "world_size": 1}
    assert {name: manifest[name] for name in wanted} == wanted
    assert manifest["data"] == read_json(run.ledger)["key"]
    assert len(manifest["template"]) == len(manifest["config"]) == 20
    assert manifest["versions"]["torch"] == installed.__version__
    assert manifest["versions"].keys() >= {"sft-dist", "transformers", "trl", "accelerate"}
    assert "deepspeed" not in manifest["versions"], "it took no part"
