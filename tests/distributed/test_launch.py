"""The command starts the processes, passes signals on, tells what went wrong once, and leaves nobody behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.config.loader import load_run_config
from sft_dist.errors import ConfigError
from sft_dist.files import read_json, read_jsonl
from sft_dist.jobs.launcher import children
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import damage

TinyRun = Callable[..., RunDir]
Start = Callable[..., "subprocess.Popen[str]"]

TWO = ("parallel.plan=ddp", "parallel.num_processes=2")
GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended before: {process.communicate()}")
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def step(run: RunDir) -> int:
    return max((row["step"] for row in read_jsonl(run.metrics)), default=0)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of the workers of a running `sft-dist train`, by rank."""
    (agent,) = children(process.pid)
    return sorted(children(agent), key=lambda pid: int(variable(pid, "RANK")))


def variable(pid: int, name: str) -> str:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(entry.decode().partition("=")[2] for entry in entries if entry.startswith(f"{name}=".encode()))


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_a_run_is_stopped_and_resumed_from_end_to_end(start: Start, tmp_path: Path, tiny_model_dir: Path) -> None:
    run = RunDir(tmp_path / "runs" / "whole")
    options = [
        "run.name=whole",
        f"run.dir={run.path.parent}",
        "train.max_steps=40",
        "train.eval_strategy=no",
        "checkpoint.save_strategy=no",
        "evaluate.data={task: tickets, rows: 2, seed: 2}",
        "evaluate.generation={max_new_tokens: 2}",
    ]
    (temporary := tmp_path / "tmp").mkdir()
    first = start("-m", "sft_dist", "train", "smoke", *options, *TWO, TMPDIR=str(temporary))
    until(lambda: step(run) >= 2, first)
    (agent,) = children(first.pid)
    all_of_it = [agent, *workers(first)]
    assert len(all_of_it) == 3
    first.send_signal(signal.SIGINT)  # to the command alone, as a job script would; a terminal signals the whole group
    code, _, err = finish(first)
    assert code == 75, err
    assert "Traceback" not in err
    assert err.count(f"sft-dist resume {run.path}") == err.count("stopped by SIGINT at step") == 1
    assert gone(all_of_it)
    status = run.read_status()
    assert status["state"] == "stopped"
    assert 2 <= status["step"] < 40
    assert [(at, damage(path)) for at, path in list_checkpoints(run)] == [(status["step"], None)]
    assert read_jsonl(run.eval / "before.jsonl")
    assert not run.report.exists()

    code, out, err = finish(start("-m", "sft_dist", "resume", run.path, TMPDIR=str(temporary)))
    assert code == 0, err
    assert "Traceback" not in err
    assert [left.name for left in temporary.iterdir() if not left.name.startswith("torchinductor_")] == []
    assert str(run.report) in out
    assert run.read_status()["state"] == "done"
    assert [row["step"] for row in read_jsonl(run.metrics) if "loss" in row] == list(range(1, 41))
    attempts = [(row["ended"], row["first_step"], row["last_step"]) for row in read_jsonl(run.attempts)]
    assert attempts == [("stopped", 0, status["step"]), ("done", status["step"], 40)]
    assert len(read_jsonl(run.eval / "after.jsonl")) == len(read_jsonl(run.eval / "before.jsonl")) == 2
    assert read_json(run.scores)
    assert run.report.is_file()


@pytest.fixture
def endless(tiny_run: TinyRun, tmp_path: Path) -> RunDir:
    return tiny_run(tmp_path, "endless", *TWO, "train.max_steps=1000000")


def test_a_worker_that_is_killed_fails_the_run(start: Start, endless: RunDir) -> None:
    process = start("-m", "sft_dist", "resume", endless.path)
    until(lambda: step(endless) >= 2, process)
    (agent,) = children(process.pid)
    first, second = workers(process)
    os.kill(second, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    reason = f"rank 1 (process {second}) was killed by SIGKILL"
    assert err.count(reason) == 1
    assert err.rstrip().endswith(f"error: {reason}")
    assert (endless.read_status()["state"], endless.read_status()["reason"]) == ("failed", reason)
    (row,) = read_jsonl(endless.attempts)
    assert (row["ended"], row["reason"]) == ("failed", reason)
    assert (row["failure"]["kind"], row["failure"]["rank"]) == ("unknown", 1)
    assert row["decided"] == "over: it failed, and nothing requeues it here"
    assert gone([agent, first, second])


def test_workers_whose_launcher_is_killed_save_and_end(start: Start, endless: RunDir) -> None:
    process = start("-m", "sft_dist", "resume", endless.path)
    until(lambda: step(endless) >= 2, process)
    (agent,) = children(process.pid)
    pids = [agent, *workers(process)]
    process.kill()
    until(lambda: gone(pids), seconds=60)
    status = endless.read_status()
    assert status["state"] == "stopped"
    assert [damage(path) for _, path in list_checkpoints(endless)] == [None]


def test_workers_end_with_an_agent_that_is_killed(start: Start, endless: RunDir) -> None:
    """The attempt is over and its lock is free: nobody may write to the run any more."""
    process = start("-m", "sft_dist", "resume", endless.path)
    until(lambda: step(endless) >= 2, process)
    (agent,) = children(process.pid)
    pids = workers(process)
    os.kill(agent, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    until(lambda: gone(pids), seconds=5)
    assert err.rstrip().endswith("the workers were killed with torchrun (SIGKILL) and left no word")
    assert endless.read_status()["state"] == "failed"


def test_what_is_wrong_is_said_once_with_its_exit_status(start: Start, tiny_run: TinyRun, tmp_path: Path) -> None:
    """The main process prepares the rows, while the other one waits for it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(GOOD * 20 + '{"messages": []}\n')
    run = tiny_run(tmp_path, "bad", *TWO, f"data.train={rows}")
    code, out, err = finish(start("-m", "sft_dist", "resume", run.path))
    assert code == 4
    assert err.count("rows.jsonl:21") == 1, err
    assert err.rstrip().endswith("data.on_bad_row=drop"), "torchrun, or the other process, had something to add"
    assert out == ""
    assert run.read_status()["state"] == "failed"
    (attempt,) = read_jsonl(run.attempts)
    for reason in (attempt["reason"], run.read_status()["reason"]):
        assert "rows.jsonl:21" in reason


# Python runs it when it starts: process 1 cannot load its tokenizer, as on a node where a disk is missing.
BROKEN = """
import os
if os.environ.get("RANK") == "1":
    import sft_dist.train.tokenizer as tokenizer
    from sft_dist.errors import PreflightError
    def load_tokenizer(model):
        raise PreflightError("no tokenizer on this node")
    tokenizer.load_tokenizer = load_tokenizer
"""


def test_the_reason_on_record_is_the_first_failure(start: Start, tiny_run: TinyRun, tmp_path: Path) -> None:
    """The other process only misses its peer, or is ended by torchrun."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN)
    run = tiny_run(tmp_path, "broken", *TWO)
    code, _, err = finish(start("-m", "sft_dist", "resume", run.path, PYTHONPATH=str(tmp_path / "site")))
    assert code == 3, err
    assert err.count("no tokenizer on this node") == 1
    assert "rank 1: error: no tokenizer on this node" in err
    assert run.read_status()["reason"] == "no tokenizer on this node"


# --- other launchers -------------------------------------------------------------------------------------------------

CONFIG = """
extends: smoke
run: {name: mine, dir: runs}
model: {dtype: DTYPE}
data: {eval_size: 0, train: {task: mix, rows: 24, seed: 1}}
parallel: {num_processes: 2}
train: {max_steps: 3, eval_strategy: 'no'}
checkpoint: {save_strategy: 'no'}
evaluate: {data: null, labels: [], before: false, after: false}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> Callable[[str], Path]:
    def write(dtype: str) -> Path:
        (tmp_path / "mine.yaml").write_text(CONFIG.replace("DTYPE", dtype))
        return tmp_path / "mine.yaml"

    return write


LAUNCH = """
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 2
deepspeed_config: {deepspeed_config_file: mine.json, zero3_init_flag: false}
"""


def test_accelerate_launch_starts_the_worker_and_says_the_plan(
    start: Start, config: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two processes without a GPU are enough to see that its plan arrives, and the DeepSpeed file with it."""
    zero = {"stage": 2, "reduce_bucket_size": 1234}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}}))
    (tmp_path / "launch.yaml").write_text(LAUNCH)
    words = ("launch", "--config_file", "launch.yaml", "-m", "sft_dist.train", config("auto"))
    # An empty cache: both processes build the embedded model, and either may be the first.
    strays = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "SFT_DIST_CACHE": str(tmp_path / "cache")}
    code, _, err = finish(start("-m", "accelerate.commands.accelerate_cli", *words, **strays))
    assert code == 0, err
    run = RunDir(tmp_path / "runs" / "mine")
    assert run.read_status()["state"] == "done"
    assert [row["ended"] for row in read_jsonl(run.attempts)] == ["done"]
    resolved = read_json(run.path / "env.json")["resolved"]
    assert (resolved["plan"], resolved["world_size"], resolved["dtype"]) == ("zero2", 2, "bfloat16")
    assert err.count("parallel.plan = zero2: accelerate launch was told so") == 1, "only one process tells"
    recorded, origins = load_run_config(run.config), read_json(run.provenance)
    assert (recorded.parallel.plan, recorded.model.dtype) == ("zero2", "bfloat16"), "what resume goes by"
    assert origins["parallel.plan"] == origins["model.dtype"] == "accelerate launch"
    assert read_json(run.plan / "deepspeed.json")["zero_optimization"]["reduce_bucket_size"] == 1234
    assert read_json(run.deepspeed_given)["zero_optimization"] == zero
    (built,) = (tmp_path / "cache" / "models").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in built.iterdir()}

    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {**zero, "overlap_com": True}}))
    _, _, err = finish(start("-m", "accelerate.commands.accelerate_cli", *words))
    assert err.count("zero_optimization.overlap_com: no such setting; did you mean overlap_comm?") == 1
    assert "pydantic" not in err

    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero, "fp16": {"enabled": True}}))
    _, _, err = finish(start("-m", "accelerate.commands.accelerate_cli", *words))
    assert err.count("asks for float16") == 1, "only one process tells"


def test_a_deepspeed_file_that_disagrees_is_explained(tmp_path: Path) -> None:
    """transformers compares the two as late as in train(), in words that name neither file nor config."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from sft_dist.train.worker import _disagreement

    theirs = HfTrainerDeepSpeedConfig({"bf16": {"enabled": True}, "gradient_clipping": 3.0})
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    theirs.trainer_config_process(arguments)
    with pytest.raises(ValueError) as caught:
        theirs.trainer_config_finalize(arguments, None, 10)
    error = _disagreement(caught.value)
    assert isinstance(error, ConfigError)
    assert len(error.problems) == 2
    assert any("bf16.enabled=True" in line for line in error.problems)
    other = ValueError("out of range")
    assert _disagreement(other) is other


def test_a_plan_of_several_processes_is_refused_without_a_launcher(
    start: Start, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, "alone", *TWO)
    code, _, err = finish(start("-m", "sft_dist.train", run.path))
    assert code == 2
    assert f"sft-dist train {run.path}" in err
    assert len(err.strip().splitlines()) == 2
