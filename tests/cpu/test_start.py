"""What is proven before a run directory exists, and what keeps two processes out of one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist import data_here, process
from sft_dist.config.loader import load_config
from sft_dist.config.schema import ModelConfig
from sft_dist.data_here import prepare_here
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.files import read_jsonl
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.rundir import RunDir
from sft_dist.stages import new_run
from sft_dist.train.attempt import attempt


def refused(folder: Path, *overrides: str) -> ConfigError | PreflightError:
    """The error with which the smoke recipe is refused; nothing may be left behind."""
    with pytest.raises((ConfigError, PreflightError)) as caught:
        new_run(load_config("smoke", [f"run.dir={folder}", *overrides]))
    assert not (folder / "smoke").exists()
    return caught.value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.extra.loss_type=foo", "loss_type 'foo' is not one of nll, dft"),
        ("train.extra.optim_target_modules=x", "optim_target_modules"),
    ],
)
def test_a_setting_that_would_fail_later_leaves_no_run_behind(
    tmp_path: Path, tiny_model_dir: Path, override: str, words: str
) -> None:
    assert words in str(refused(tmp_path, override))


def test_a_model_directory_without_weights_leaves_no_run_behind(tmp_path: Path, tiny_model_dir: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    error = refused(tmp_path / "runs", f"model.name={copy}")
    assert isinstance(error, PreflightError)
    assert "no *.safetensors" in str(error)


def test_a_config_without_rows_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "bare.yaml").write_text("model: {name: 'embedded:tiny'}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        new_run(load_config(str(tmp_path / "bare.yaml"), [f"run.dir={tmp_path}"]))


def test_an_nvidia_gpu_that_torch_cannot_use_is_one_clear_error(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '0, GPU-a, Fake GPU, 81559, 9.0'\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    error = refused(tmp_path / "runs", "parallel.plan=auto")
    assert isinstance(error, PreflightError)
    assert "parallel.plan=cpu" in str(error)


def test_the_held_out_rows_stay_those_of_the_start(tmp_path: Path, tiny_model_dir: Path) -> None:
    from sft_dist.evaluate.held_out import read_held_out

    file = tmp_path / "held.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "category": "sum"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = new_run(load_config("smoke", [f"run.dir={tmp_path}", f"evaluate.data={file}", "evaluate.labels=[]"]))
    file.unlink()
    kept = read_held_out(run)
    assert [(row.prompt, row.completion, row.fields["category"]) for row in kept] == [
        (f"{n} + 1 =", f" {n + 1}", "sum") for n in range(3)
    ]


HOLDER = """
import sys
from pathlib import Path
from sft_dist.rundir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_kept_out_of_a_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = new_run(load_config("smoke", [f"run.dir={tmp_path}"]))
    other: Any = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another process \(process {other.pid} on "), attempt(run):
            pass
        with pytest.raises(ConfigError, match=rf"another process works on it \(process {other.pid} on "):
            new_run(load_config("smoke", [f"run.dir={tmp_path}"]), overwrite=True)
        assert run.config.is_file(), "the run that is being worked on is untouched"
        assert read_jsonl(run.attempts) == []
    finally:
        other.communicate("")
    with attempt(run):  # the lock went with its process
        assert RunDir(run.path).read_status()["state"] == "running"


def test_speed_counts_the_time_inside_steps_only(tmp_path: Path, tiny_model_dir: Path) -> None:
    """An evaluation between two log events must not make the training look slower or faster."""
    from types import SimpleNamespace

    from sft_dist.config.schema import Config
    from sft_dist.train import callbacks
    from sft_dist.train.progress import Progress
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.saving import Saves
    from sft_dist.train.shutdown import StopRequest

    now = 0.0
    config = Config()
    saves = Saves(RunDir(tmp_path), config.checkpoint, {}, Ranks())
    recorder = callbacks.RunRecorder(RunDir(tmp_path), config, StopRequest(), Progress(), saves)
    state = SimpleNamespace(global_step=0, max_steps=2)
    control = SimpleNamespace(should_training_stop=False)
    recorder.on_train_begin(SimpleNamespace(use_cpu=True), state, control)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.time, "monotonic", lambda: now)
        for step, began, now in ((1, 0.0, 2.0), (2, 100.0, 103.0)):  # 2 s and 3 s of work, 98 s of something else
            ended, now = now, began
            recorder.on_step_begin(None, state, control)
            state.global_step, now = step, ended
            recorder.on_step_end(None, state, control)
        now = 105.0  # 2 s until the loss has come from the device; what comes after this log is no step's.
        recorder.on_log(None, state, control, {"loss": 1.0, "num_tokens": 700})
        now = 200.0
        recorder.on_log(None, state, control, {"eval_loss": 1.0})
    row, _ = read_jsonl(RunDir(tmp_path).metrics)
    assert row["tokens_per_s"] == 100.0
    assert row["memory_gib"] > 0


@pytest.mark.parametrize(
    ("gpus", "told", "threads"), [((Gpu("NVIDIA H100", 80.0, 9.0),), None, [1]), ((), None, [7]), ((), "3", [])]
)
def test_beside_a_gpu_one_thread_joins_the_rows(
    gpus: tuple[Gpu, ...], told: str | None, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several take three times as long for tensors this small, while the GPU waits."""
    import torch

    from sft_dist.config.schema import Config
    from sft_dist.train import settle

    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    machine = Machine(cpu="x", cores=7, cpu_bf16=False, memory_gib=64.0, gpus=gpus)
    monkeypatch.setattr(settle, "this_machine", lambda: machine)
    for name, value in (("OMP_NUM_THREADS", told), ("CUDA_VISIBLE_DEVICES", "0"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    settle.resolve_here(Config())
    assert found == threads


def test_a_step_waits_for_no_disk(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync beside a checkpoint that is being written takes as long as that."""
    from types import SimpleNamespace

    from sft_dist.config.schema import Config
    from sft_dist.train.callbacks import RunRecorder
    from sft_dist.train.progress import Progress
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.saving import Saves
    from sft_dist.train.shutdown import StopRequest

    run, config = RunDir(tmp_path), Config()
    recorder = RunRecorder(run, config, StopRequest(), Progress(), Saves(run, config.checkpoint, {}, Ranks()))
    state = SimpleNamespace(global_step=0, max_steps=2)
    control = SimpleNamespace(should_training_stop=False)
    recorder.on_train_begin(SimpleNamespace(use_cpu=True), state, control)

    def sync(handle: int) -> None:
        raise AssertionError("a step must not sync")

    monkeypatch.setattr("os.fsync", sync)
    recorder.on_step_begin(None, state, control)
    state.global_step = 1
    recorder.on_step_end(None, state, control)
    recorder.on_log(None, state, control, {"loss": 1.0, "num_tokens": 10})
    assert run.read_status()["step"] == 1
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1]


def test_the_preview_shows_characters_of_several_tokens_whole(tiny_model_dir: Path) -> None:
    from sft_dist.config.schema import ModelConfig
    from sft_dist.data.view import decoder, pieces
    from sft_dist.train.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name="embedded:tiny")).tokenizer
    ids = tokenizer("Zürich 理论 🙂!")["input_ids"]
    texts = pieces(decoder(tokenizer), ids, [True] * len(ids))
    assert len(texts) == len(ids), "a piece for each token, so that the counts stay right"
    assert "".join(texts) == "Zürich 理论 🙂!"
    assert "\ufffd" in tokenizer.decode(ids[:-3]), "the emoji is made of several tokens"


def test_what_libraries_print_while_a_run_is_proven_is_no_result(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts read the number of the job from stdout."""
    monkeypatch.setattr("sft_dist.train.model.find_model", lambda model: print("no accelerator detected"))
    new_run(load_config("smoke", [f"run.dir={tmp_path}"]))
    out, err = capsys.readouterr()
    assert out == ""
    assert "no accelerator detected" in err


WITHOUT_TORCH = """
import sys
from sft_dist.process import begin
begin()
from sft_dist.cli import main
sys.argv[0] = "sft-dist"
try:
    main()
finally:
    print("torch:", sys.modules.get("torch"))
"""


@pytest.mark.parametrize("verb", ["prepare", "preview"])
def test_rows_are_prepared_and_shown_without_torch_and_are_those_that_a_run_trains_on(
    verb: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """torch takes most of the seconds that an answer from the cache takes. A run has it when it asks for its rows."""
    rows = prepare_here(load_config("smoke").config)
    assert sys.modules["torch"] is not None
    command = [sys.executable, "-c", WITHOUT_TORCH, "data", verb, "smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said, _, torch = done.stdout.partition("torch: ")
    assert (done.returncode, torch) == (0, "None\n"), done.stderr
    assert "PyTorch" not in done.stderr
    assert verb == "preview" or json.loads(said) == rows


def test_a_tokenizer_with_code_of_its_own_may_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[str] = []
    monkeypatch.setattr(process, "leave_out", left_out.extend)
    for trusted, expected in ((True, []), (False, ["torch"])):
        data_here._leave_out_torch(ModelConfig(name="someone/model", trust_remote_code=trusted))
        assert left_out == expected
