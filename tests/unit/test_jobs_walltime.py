"""What a time limit leaves for training, in numbers that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.config.loader import write_config
from sft_dist.config.schema import Config
from sft_dist.files import write_json
from sft_dist.jobs import walltime
from sft_dist.jobs.walltime import Pace, outlook, outlook_lines, pace_file, read_pace, sentences, write_pace
from sft_dist.rundir import RunDir


def a_run(folder: Path, **slurm: object) -> RunDir:
    run = RunDir(folder / "run")
    run.path.mkdir(exist_ok=True)
    run.config.write_text(write_config(Config.model_validate({"slurm": slurm})))
    return run


def test_an_hour_of_ten_second_steps() -> None:
    """3600 - 120 before the end - 60 that SLURM may be early - 20 to start = 3400 s: 340 steps."""
    found = outlook(Pace(10.0, 30.0, 20.0), 3600.0, 120.0, steps_left=1000)
    assert (found.steps_a_job, found.jobs) == (340, 3)
    assert found.needed_s == 2 * (10 + 30) + 15
    assert found.last_save_s == 3600 - 95 / 2
    assert sentences(found, "RUN")[1] == []
    assert outlook(Pace(10.0, 30.0, 20.0), 3600.0, 120.0, steps_left=340).jobs == 1
    assert outlook(Pace(10.0, 30.0, 20.0), 3600.0, 120.0, steps_left=341).jobs == 2
    assert outlook(Pace(10.0, 30.0, 20.0), 3600.0, 120.0, steps_left=0).jobs == 0


def test_a_signal_that_comes_too_late_is_warned_of_with_the_sum() -> None:
    found = outlook(Pace(40.0, 50.0, 20.0), 3600.0, 120.0, steps_left=100)
    lines, (warning,) = sentences(found, "runs/x")
    assert warning == (
        "slurm.signal_delay_s is 120, but 2 x (a step (40.0 s) + a save (50.0 s)) + 15 s = 195 s; "
        "set slurm.signal_delay_s=195: sft-dist submit runs/x slurm.signal_delay_s=195"
    )
    assert lines[0].startswith("a job of 60 min holds about 85 steps of 40 s")
    assert "what is left takes about 2 jobs" in lines[0]
    assert outlook(Pace(40.0, 50.0, 20.0), 3600.0, 195.0, 100).needed_s <= 195.0, "what it says to set is enough"


def test_without_a_save_only_the_step_counts_and_it_is_said() -> None:
    found = outlook(Pace(60.0), 3600.0, 120.0, steps_left=1)
    assert found.needed_s == 135.0
    assert "a save that is not measured yet" in sentences(found, "x")[1][0]


def test_a_job_that_cannot_get_to_a_step_is_said() -> None:
    found = outlook(Pace(100.0, 1.0, 60.0), 300.0, 120.0, steps_left=5)
    assert (found.steps_a_job, found.jobs) == (0, None)
    lines, warnings = sentences(found, "x")
    assert "what is left" not in lines[0]
    assert warnings[-1].startswith(
        "slurm.time is 5 min, and 60 s to start + 120 + 60 s before the end + a step (100.0 s)"
    )


def test_the_pace_is_kept_from_attempt_to_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_pace(run) is None
    write_pace(run, [], 1.0, 1.0)
    assert read_pace(run) is None, "no step, no pace"
    write_pace(run, [90.0, 8.0, 7.0, 6.0, 5.0, *[2.0] * 9, 50.0], 4.567, 31.0)
    assert read_pace(run) == Pace(2.0, 4.57, 31.0)
    write_pace(run, [3.0], None, None)
    assert read_pace(run) == Pace(3.0, 4.57, 31.0)


@pytest.mark.parametrize("content", [[], {"step_s": "x"}, {"step_s": 0}, {"step_s": True}, {}])
def test_a_damaged_pace_is_none(tmp_path: Path, content: object) -> None:
    write_json(pace_file(RunDir(tmp_path)), content)
    assert read_pace(RunDir(tmp_path)) is None


def test_a_run_says_what_its_files_tell(tmp_path: Path) -> None:
    run = a_run(tmp_path, time="01:00:00")
    run.write_status(state="running", step=100, max_steps=440)
    assert outlook_lines(run) == ([], []), "nothing was measured"
    write_json(pace_file(run), {"step_s": 10.0, "save_s": 30.0, "start_s": 20.0})
    lines, warnings = outlook_lines(run)
    assert "340 steps of 10 s" in lines[0]
    assert lines[0].endswith("what is left takes about 1 job")
    assert warnings == []
    run.write_status(step="damaged")
    assert outlook_lines(run) == ([], [])
    run.write_status(step=None, max_steps=None)
    assert outlook_lines(run) == ([], [])
    run.config.write_text("{")
    run.write_status(step=1, max_steps=2)
    assert outlook_lines(run) == ([], [])


def test_the_age_of_this_process_is_known() -> None:
    age = walltime.process_age_s()
    assert age is not None
    assert 0 <= age < 86400


def test_status_says_it_of_a_run_that_goes_on_in_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.jobs.status import look
    from sft_dist.report.status_table import details

    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue: the run waits in a queue that cannot be seen
    run = a_run(tmp_path, time=60)
    run.write_status(state="queued", step=100, max_steps=440, attempt=1)
    write_json(run.path / "slurm" / "job.json", {"job_id": "7", "nodes": 1})
    (status,), _ = look([run])
    assert status.facts()["walltime"] is None
    write_json(pace_file(run), {"step_s": 40.0, "save_s": 50.0, "start_s": 20.0})
    (status,), _ = look([run])
    lines = list(details(status))
    assert any(line.startswith("walltime    a job of 60 min holds about 85 steps of 40 s") for line in lines), lines
    assert any(line.startswith("warning     slurm.signal_delay_s is 120, but") for line in lines), lines
    facts = status.facts()["walltime"]
    assert (facts["steps_a_job"], facts["jobs"], facts["needed_s"]) == (85, 4, 195.0)
    run.write_status(state="done")
    (status,), _ = look([run])
    assert status.facts()["walltime"] is None
