"""Handing over: what sbatch gets, what is left behind if it refuses, and the way without SLURM. No torch, no SLURM."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError, SftDistError
from sft_dist.files import read_json, read_jsonl, write_json
from sft_dist.jobs import submit as module
from sft_dist.jobs.node import NodeJob
from sft_dist.jobs.status import look
from sft_dist.jobs.submit import CHAIN, Part, dry_script, local_gpus, needs_slurm, slurm_folder, submit, submit_in_turn
from sft_dist.rundir import RunDir, refuse_existing

submitit = pytest.importorskip("submitit")

Here = Callable[[Part], "dict[str, Any]"]

# Numbers from 1; refuses the job whose number REFUSES holds. What scancel is asked for is in a file, too.
SBATCH = """n=$(($(cat {box}/count 2>/dev/null || echo 0) + 1)); echo $n > {box}/count; cp "$1" {box}/script.$n
[ "$n" != "$(cat {box}/refuses 2>/dev/null)" ] || {{ echo 'sbatch: error: invalid partition specified: gpo' >&2; exit 1; }}
echo "Submitted batch job $n" """


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for SLURM's commands, which are on the PATH."""
    folder = tmp_path / "slurm tools"
    folder.mkdir()
    scripts = {"sbatch": SBATCH.replace("{box}", f"'{folder}'").replace("{{", "{").replace("}}", "}")}
    scripts |= {"scancel": f"echo \"$*\" >> '{folder}/cancelled'", "srun": ":", "squeue": ":", "sacct": ":"}
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "/nowhere")
    return folder


def part(name: str = "demo", parts: Sequence[str] = module.EVERYTHING, kind: str = "run", **slurm: Any) -> Part:
    run = RunDir(Path("runs") / name)
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.write_text("run: {}\n")
    return Part(run, Config.model_validate({"run": {"name": name}, "slurm": slurm}), tuple(parts), kind=kind)


def chain() -> list[Part]:
    return [part(parts=parts, kind=kind) for kind, parts in CHAIN.items()]


def lines(box: Path, number: int, option: str) -> list[str]:
    text = (box / f"script.{number}").read_text()
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"#SBATCH --{option}=")]


def test_jobs_of_a_chain_wait_for_each_other(box: Path) -> None:
    assert submit_in_turn(chain(), after=["77"]) == ["1", "2", "3"]
    assert [lines(box, number, "dependency") for number in (1, 2, 3)] == [["afterok:77"], ["afterok:1"], ["afterok:2"]]
    jobs = read_json(slurm_folder(RunDir(Path("runs/demo"))) / "job.json")["jobs"]
    assert [(job["job_id"], job["kind"]) for job in jobs] == [("1", "prepare"), ("2", "train"), ("3", "evaluate")]


def test_a_later_link_of_a_chain_leaves_the_state_to_the_first(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may be at work before the last is submitted."""
    run, record = RunDir(Path("runs/demo")), module._record

    def started(made: Part, number: str, folder: Path, *, local: bool) -> None:
        record(made, number, folder, local=local)
        if number == "1":
            run.write_status(state="running", attempt=1)
            run.cancelled.touch()

    monkeypatch.setattr(module, "_record", started)
    submit_in_turn(chain())
    assert (run.read_status()["state"], run.read_status()["attempt"], run.cancelled.exists()) == ("running", 1, True)


def test_an_attempt_that_left_no_line_gets_one_before_the_next_job(box: Path) -> None:
    """The new job's state takes the place of the last sign of life."""
    again = part()
    heard = "2026-01-01T00:00:00+00:00"
    status = {"state": "running", "attempt": 1, "step": 7, "job": {"job_id": "6"}, "updated": heard}
    write_json(again.run.status, status)
    submit_in_turn([again])
    (row,) = read_jsonl(again.run.attempts)
    assert (row["job_id"], row["end"], row["decided"]) == ("6", heard, "lost")
    assert again.run.read_status()["state"] == "queued"


def test_a_chain_is_submitted_whole_or_not_at_all(box: Path) -> None:
    """A limit on the number of jobs stops it in the middle."""
    (box / "refuses").write_text("3")
    with pytest.raises(SftDistError, match="invalid partition"):
        submit_in_turn(chain())
    assert (box / "cancelled").read_text() == "1 2\n"


def test_a_refusal_says_why_and_how_to_go_on(box: Path) -> None:
    (box / "refuses").write_text("1")
    one = part()
    with pytest.raises(SftDistError, match="invalid partition specified: gpo") as caught:
        submit_in_turn([one])
    assert "sft-dist submit runs/demo slurm." in str(caught.value)
    assert not (box / "cancelled").exists()
    (status,), _ = look([one.run])
    assert (status.state, status.next_command) == ("failed", "sft-dist submit runs/demo")
    assert "invalid partition" in status.verdict.why
    with pytest.raises(ConfigError, match="sft-dist submit runs/demo"):
        refuse_existing(Path("runs"), "demo")


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_the_dry_run_is_what_sbatch_gets(box: Path, names: list[str], tmp_path: Path) -> None:
    parts, folder = [part(name) for name in names], tmp_path / "folder"
    shown = dry_script(parts, folder=folder, after=["7"], name="sweep")
    assert not folder.exists()
    submit(parts, folder=folder, after=["7"], name="sweep")
    assert shown == (box / "script.1").read_text() == (parts[0].run.plan / "job.sbatch").read_text()
    assert lines(box, 1, "array") == ([] if len(names) == 1 else ["0-1%2"])


def test_without_slurm_it_ends_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PreflightError, match="no sbatch"):
        needs_slurm(local=False)
    needs_slurm(local=True)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """`here(part)` submits it locally to a stand-in for submitit's executor: what that was given."""
    given: dict[str, Any] = {}

    class Executor:
        def __init__(self, **values: Any) -> None:
            given.update(values)

        def update_parameters(self, **values: Any) -> None:
            given.update(values)

        def submit(self, _: Any) -> Any:
            given["on_ctrl_c"] = signal.getsignal(signal.SIGINT)
            return subprocess.Popen(["readlink", *(f"/proc/self/fd/{number}" for number in range(3))])

    def run(one: Part) -> dict[str, Any]:
        slurm_folder(one.run).mkdir(parents=True, exist_ok=True)
        module._submit_here(submitit, one, slurm_folder(one.run), NodeJob({})).wait()
        return given

    monkeypatch.setattr(submitit, "LocalExecutor", Executor)
    return run


def test_a_local_job_has_bash_and_the_gpus_of_this_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    """And it is in no process group that this terminal's Ctrl-C reaches."""
    (tmp_path / "activate").write_text("export FROM_SETUP='a b'\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,1")
    given = here(part(setup=("source ./activate", "[[ a == a ]]"), gpus_per_node=2))
    tell = (
        "import os; print(os.environ['FROM_SETUP'], os.environ['CUDA_VISIBLE_DEVICES'], os.getpgid(0) == os.getpid())"
    )
    command = [*shlex.split(given["python"]), "-c", tell]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}  # as submitit sets it
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "a b 5,3 True\n"
    assert given["on_ctrl_c"] == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_local_job_holds_no_output_of_this_command(here: Here, capfd: pytest.CaptureFixture[str]) -> None:
    """A pipe behind `submit --local` would wait for the end of the job."""
    one = part()
    here(one)
    print("mine")
    log = slurm_folder(one.run) / "controller.log"
    assert log.read_text().splitlines() == [os.devnull, str(log), str(log)]
    assert capfd.readouterr().out == "mine\n"


def test_a_local_jobs_setup_that_fails_is_said_in_its_log(here: Here) -> None:
    command = [*shlex.split(here(part(setup=("source nowhere",)))["python"]), "-c", "print('trained')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, "nowhere" in done.stderr) == (1, "", True)


def test_gpus_of_a_local_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slurm = part(gpus_per_node=2).config.slurm
    assert local_gpus(slurm) == "0,1"
    assert local_gpus(part().config.slurm) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="names 1: 7"):
        local_gpus(slurm)


def test_a_local_job_has_no_limit_that_nobody_set(here: Here) -> None:
    assert here(part())["timeout_min"] > 24 * 60
    given = here(part(time=90, signal_delay_s=300))
    assert (given["timeout_min"], given["signal_delay_s"]) == (90, 300)
