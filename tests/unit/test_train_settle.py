"""What is decided and looked for before anything is trained; nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from sft_dist.config.loader import write_config
from sft_dist.config.schema import Config
from sft_dist.errors import PreflightError
from sft_dist.files import read_json, read_jsonl
from sft_dist.jobs import launcher
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.resolve import Resolved, resolve, with_rows
from sft_dist.parallel.told import Told
from sft_dist.parallel.world import World
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import settle
from sft_dist.train.ranks import _on_one_kind_of_device

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

GPU_NODE = Machine(cpu="x", cores=64, cpu_bf16=False, memory_gib=64.0, gpus=(Gpu("NVIDIA H100", 80.0, 9.0),) * 4)
ZERO2 = {"plan": "zero2", "num_processes": 2}


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(settle, "find_spec", lambda name: None if name == package else object())


@pytest.mark.parametrize(
    ("package", "tree", "command"),
    [
        ("deepspeed", {"parallel": {"plan": "zero2"}}, "sft-dist[deepspeed]"),
        ("peft", {"model": {"lora": {}}}, "sft-dist[lora]"),
        ("bitsandbytes", {"model": {"lora": {"quantization": "nf4"}}, "parallel": {"plan": "ddp"}}, "sft-dist[qlora]"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, tree: dict[str, object], command: str
) -> None:
    config = Config.model_validate(tree)
    resolved = resolve(config, GPU_NODE)
    without(monkeypatch, "")
    settle.needs_packages(config, resolved)
    without(monkeypatch, package)
    with pytest.raises(PreflightError, match=f"the package {package} is not installed") as refused:
        settle.needs_packages(config, resolved)
    assert command in str(refused.value.hint)
    needs_nothing = Config.model_validate({"parallel": {"plan": "ddp"}})
    settle.needs_packages(needs_nothing, resolve(needs_nothing, GPU_NODE))


@pytest.mark.parametrize(
    ("tree", "unused"),
    [
        ({}, ("bitsandbytes", "wandb")),
        ({"tracking": {"report_to": ("tensorboard",)}}, ("bitsandbytes", "wandb")),
        ({"tracking": {"report_to": ("wandb",)}}, ("bitsandbytes",)),
        ({"model": {"lora": {"quantization": "nf4"}}}, ("wandb",)),
        ({"model": {"lora": {}}}, ("wandb",)),  # the base model may have been published in 4 bits
        ({"train": {"extra": {"use_liger_kernel": True}}}, ()),
    ],
)
def test_what_a_run_has_no_use_for(tree: dict[str, object], unused: tuple[str, ...]) -> None:
    config = Config.model_validate({"parallel": {"plan": "ddp"}, **tree})
    resolved = resolve(config, GPU_NODE)
    assert settle.unused_packages(config, resolved) == unused
    # A DeepSpeed file of one's own may log to wandb.
    assert settle.unused_packages(config, dataclasses.replace(resolved, given={"wandb": {"enabled": True}})) == ()


def test_a_run_that_goes_on_where_a_package_is_missing_starts_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`resume`, and the nodes of a job, may have another environment than the one in which the run was proven."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = RunDir(tmp_path / "mine")
    run.path.mkdir()
    run.config.write_text(write_config(Config.model_validate({"run": {"name": "mine"}, "parallel": ZERO2})))
    monkeypatch.setattr(settle, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    for start in ("run_workers", "run_alone"):
        monkeypatch.setattr(launcher, start, lambda *_: pytest.fail("a process was started"))
    with pytest.raises(PreflightError, match="deepspeed is not installed"):
        run_here(run)
    assert [row["ended"] for row in read_jsonl(run.attempts)] == ["failed"]
    assert not run.env.exists()


# Python runs it when it starts: the signal comes while the command line is being imported.
EARLY = """
import os, signal, sys
class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "sft_dist.cli":
            os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Early())
"""


def test_a_signal_before_the_attempt_is_put_on_record(tmp_path: Path, run_cli: RunCli) -> None:
    """Without a handler SIGUSR1 ends a process, and nobody would know that the run was asked to stop."""
    (tmp_path / "sitecustomize.py").write_text(EARLY)
    run = RunDir(tmp_path / "mine")
    run.path.mkdir()
    run.config.write_text(write_config(Config.model_validate({"run": {"name": "mine"}, "parallel": ZERO2})))
    where = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = run_cli("resume", run.path, env={"PYTHONPATH": where, "CUDA_VISIBLE_DEVICES": ""})
    assert ended.returncode == 75, ended.stderr
    assert [(row["ended"], row["reason"]) for row in read_jsonl(run.attempts)] == [
        ("stopped", "stopped by SIGUSR1 outside of the training")
    ]
    assert run_cli("--help", env={"PYTHONPATH": where}).returncode == -signal.SIGUSR1, "the signal did not come"


def test_what_the_rows_change_is_on_record_and_memory_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With rows of 500,000 tokens layers must be recomputed; the longest one has 200."""
    monkeypatch.setattr(settle, "environment", lambda machine, resolved: {"decisions": list(resolved.decisions)})
    caplog.set_level(logging.INFO, logger="sft_dist")
    tree = {"data": {"max_length": 500000}, "train": {"global_batch_size": 512}, "parallel": {"plan": "fsdp2"}}
    config, run = Config.model_validate(tree), RunDir(tmp_path)
    first = resolve(config, GPU_NODE)
    settle.record_environment(run, first)
    assert "fsdp_activation_checkpointing: true" in (run.plan / "accelerate.yaml").read_text()
    assert "memory: " not in caplog.text
    refined = with_rows(first, GPU_NODE, {"longest_row": 200, "tokens": 10000, "rows": 100})
    settle.record_refined(run, refined, first)
    assert "fsdp_activation_checkpointing: false" in (run.plan / "accelerate.yaml").read_text()
    recorded = read_json(run.env)["decisions"]
    subjects = [line.partition(" = ")[0].partition(": ")[0] for line in recorded]
    assert len(set(subjects)) == len(subjects), "an earlier decision stands beside the one that replaced it"
    assert caplog.text.count("memory: ") == 1
    said = [record.getMessage() for record in caplog.records]
    assert all(line in said for line in recorded)


def test_memory_is_said_where_the_rows_change_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, logger="sft_dist")
    resolved = resolve(Config(), GPU_NODE)
    settle.record_refined(RunDir(tmp_path), resolved, resolved)
    assert [record.getMessage()[:8] for record in caplog.records] == ["memory: "]
    assert not list(tmp_path.iterdir())


FILE = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1234}}


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose workers were launched with a DeepSpeed file, before its first checkpoint."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(settle, "environment", lambda machine, resolved: {})
    run = RunDir(tmp_path / "mine")
    config = Config.model_validate({"parallel": ZERO2})
    world = World(2, 0, 0, 2, True, Told(deepspeed=FILE))
    settle.record_environment(run, resolve(config, settle.this_machine(), world))
    return run


def test_the_deepspeed_file_of_a_launch_is_on_record_and_used_again(launched: RunDir) -> None:
    assert read_json(launched.plan / "deepspeed.json")["zero_optimization"]["reduce_bucket_size"] == 1234
    again = settle.resolve_here(Config.model_validate({"parallel": ZERO2}), run=launched)
    assert again.given == FILE
    settle.record_environment(launched, again)
    assert read_json(launched.plan / "deepspeed.json")["zero_optimization"]["reduce_bucket_size"] == 1234


def test_a_plan_without_deepspeed_keeps_no_file_of_it(launched: RunDir) -> None:
    ddp = settle.resolve_here(Config.model_validate({"parallel": {**ZERO2, "plan": "ddp"}}), run=launched)
    assert ddp.given == {}
    settle.record_environment(launched, ddp)
    assert not launched.deepspeed_given.exists()


def test_a_run_goes_on_with_the_plan_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` was fsdp2 when it began; here, without a GPU and with two processes, it would be ddp today."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config, run = Config.model_validate({"parallel": {"num_processes": 2}}), RunDir(tmp_path / "mine")
    assert settle.resolve_here(config, run=run).plan == "ddp"
    facts = {**resolve(config, settle.this_machine()).facts(), "plan": "fsdp2"}
    for number, content in {1: {**facts, "plan": "zero1"}, 3: facts, 5: None}.items():
        folder = run.checkpoints / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("torn" if content is None else json.dumps(content))
    assert settle.resolve_here(config, run=run).plan == "fsdp2"


@dataclasses.dataclass(frozen=True)
class Second:
    """A second process, whose main one has decided `theirs`."""

    theirs: Resolved

    def by_main(self, work: Callable[[], Resolved]) -> Resolved:
        return self.theirs


def test_every_process_takes_the_plan_of_the_main_one(tmp_path: Path) -> None:
    """Hosts may have different GPUs, or a broken driver; their numbers of cores may differ."""
    config = Config.model_validate({"parallel": {"plan": "fsdp2"}})
    theirs = resolve(config, GPU_NODE)
    mine = resolve(config, dataclasses.replace(GPU_NODE, cores=8, gpus=(Gpu("Tesla T4", 15.0, 7.5),) * 4))
    assert mine != theirs
    found = settle.as_main(Second(theirs), lambda: mine, mine.num_threads)  # type: ignore[arg-type]
    assert found == dataclasses.replace(theirs, num_threads=2)


class Board:
    """Stands in for the store where processes meet."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]


def test_a_process_without_a_gpu_among_others_is_refused_before_they_wait_for_it() -> None:
    board = Board()
    for rank, use_cpu in ((0, False), (1, False)):
        _on_one_kind_of_device(board, World(2, rank, rank, 2, True), use_cpu=use_cpu)
    with pytest.raises(PreflightError, match=r"computes on GPUs, but this one \(on .*\) on the CPU"):
        _on_one_kind_of_device(board, World(2, 1, 1, 2, True), use_cpu=True)


def test_variables_of_a_users_shell_reach_no_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The workers stood under another plan than the process that started them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert settle.resolve_here(Config.model_validate({"parallel": ZERO2})).plan == "zero2"
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert caplog.text.count("set without accelerate launch, and ignored") == 1
