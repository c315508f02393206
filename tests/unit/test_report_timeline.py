"""Where the time of a run's attempts went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import append_jsonl, write_json
from sft_dist.report.facts import read_facts
from sft_dist.report.timeline import DRAWN, Timeline, attempt_spans, timeline
from sft_dist.rundir import RunDir

DAY = "2026-11-22T"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "demo").mkdir()
    return RunDir(tmp_path / "demo")


def attempt(number: int, start: str, end: str | None, ended: str, **more: Any) -> dict[str, Any]:
    times = {"start": f"{DAY}{start}+00:00"} | ({"end": f"{DAY}{end}+00:00"} if end else {})
    return {"attempt": number, **times, "ended": ended, **more}


def row(step: int, time: str) -> dict[str, Any]:
    """A step of a thousand tokens, which took ten seconds."""
    return {"step": step, "time": f"{DAY}{time}+00:00", "loss": 1.0, "tokens": 1000 * step, "tokens_per_s": 100.0}


def interrupted(run: RunDir) -> None:
    """Killed in its fifth step, with a checkpoint of the third; requeued after a minute, and through then."""
    reached = {"step": 5, "checkpoint": 3, "stages": 0}
    append_jsonl(run.attempts, attempt(1, "10:00:00", "10:01:10", "failed", reached=reached))
    append_jsonl(run.attempts, attempt(2, "10:02:10", "10:03:00", "done", reached={"step": 6, "checkpoint": 6}))
    for step, time in enumerate(("10:00:20", "10:00:30", "10:00:40", "10:02:35", "10:02:45", "10:02:55"), 1):
        append_jsonl(run.metrics, row(step, time))


def drawn(run: RunDir) -> Timeline:
    found = timeline(read_facts(run))
    assert found is not None
    return found


def test_what_counts_what_is_done_again_and_what_is_neither(run: RunDir) -> None:
    interrupted(run)
    first, second = attempt_spans(read_facts(run))
    assert first.seconds == {"queue": 0.0, "rest": 20.0, "work": 30.0, "lost": 20.0}
    assert second.seconds == {"queue": 60.0, "rest": 20.0, "work": 30.0, "lost": 0.0}


def test_bars_stand_where_their_time_was(run: RunDir) -> None:
    interrupted(run)
    found = drawn(run)
    assert [bar.name for bar in found.bars] == ["1", "2"]
    # Three minutes in all: 70 s, a minute of waiting, 50 s.
    assert found.bars[0].parts == (
        ("rest", "0.000%", "11.111%"),
        ("work", "11.111%", "16.667%"),
        ("lost", "27.778%", "11.111%"),
    )
    assert found.bars[1].parts[0] == ("queue", "38.889%", "33.333%")
    assert [(kind, time) for kind, _, time in found.totals] == [
        *(("queue", "1 min"), ("rest", "40 s"), ("work", "1 min"), ("lost", "20 s"))
    ]
    assert found.bars[0].title.startswith("attempt 1, failed: 20 s starting")


@pytest.mark.parametrize(
    ("resolved", "said"),
    [
        ({"world_size": 8, "use_cpu": False}, "steps that count: 0.1333 GPU hours on 8 GPUs, and 0.1333 around them."),
        ({"world_size": 2, "use_cpu": True}, "steps that count."),
        ({}, "steps that count."),
    ],
    ids=["GPUs", "CPU", "unknown"],
)
def test_gpu_hours_where_there_were_gpus(run: RunDir, resolved: dict[str, Any], said: str) -> None:
    interrupted(run)
    write_json(run.env, {"resolved": resolved})
    assert drawn(run).summary == f"50.0% of 2 min in attempts were {said}"


def test_the_attempt_under_way_lasts_until_the_last_sign_of_life(run: RunDir) -> None:
    append_jsonl(run.attempts, attempt(1, "10:00:00", None, ""))
    append_jsonl(run.metrics, row(1, "10:00:30"))
    write_json(run.status, {"state": "running", "updated": f"{DAY}10:00:40+00:00"})
    (span,) = attempt_spans(read_facts(run))
    assert span.seconds == {"queue": 0.0, "rest": 30.0, "work": 10.0, "lost": 0.0}


def test_an_attempt_that_nobody_saw_end_lasts_until_its_last_row(run: RunDir) -> None:
    append_jsonl(run.attempts, attempt(1, "10:00:00", None, ""))
    append_jsonl(run.attempts, attempt(2, "10:05:00", "10:05:30", "done"))
    append_jsonl(run.metrics, row(1, "10:00:30"))
    first, second = attempt_spans(read_facts(run))
    assert sum(first.seconds.values()) == 30.0
    assert second.seconds["queue"] == 270.0


def test_only_the_latest_are_drawn_and_all_are_counted(run: RunDir) -> None:
    for number in range(DRAWN + 5):
        append_jsonl(run.attempts, attempt(number, f"10:{number % 60:02d}:00", f"10:{number % 60:02d}:10", "failed"))
    found = drawn(run)
    assert (len(found.bars), found.left_out) == (DRAWN, 5)
    assert "10 min 50 s in attempts" in found.summary


@pytest.mark.parametrize(
    "line", [{}, {"start": "x"}, {"start": f"{DAY}10:00:00+00:00", "end": f"{DAY}09:00:00+00:00"}, {"start": 3}]
)
def test_lines_without_times_draw_nothing(run: RunDir, line: dict[str, Any]) -> None:
    append_jsonl(run.attempts, line)
    assert timeline(read_facts(run)) is None


def test_energy_of_the_attempts_that_know_it(run: RunDir) -> None:
    interrupted(run)
    assert "kWh" not in drawn(run).summary
    append_jsonl(run.attempts, attempt(3, "10:04:00", "10:05:00", "done", energy_kwh=1.25))
    assert drawn(run).summary.endswith("The GPUs used 1.25 kWh while training in 1 of 3 attempts.")


def hours(run: RunDir, *attempts: dict[str, Any]) -> str:
    """Two attempts of an hour each, half an hour of which was one step that counts."""
    for number, more in enumerate(attempts, 10):
        append_jsonl(run.attempts, attempt(number, f"{number}:00:00", f"{number}:59:59", "failed", **more))
        append_jsonl(
            run.metrics,
            {**row(number - 9, f"{number}:40:00"), "tokens": 1000 * (number - 9), "tokens_per_s": 1000 / 1800},
        )
    return drawn(run).summary


def test_each_attempt_has_its_own_gpus(run: RunDir) -> None:
    """Requeued on fewer: an hour on 32 and one on 8, whatever the last start had."""
    write_json(run.env, {"resolved": {"world_size": 8, "use_cpu": False}})
    assert hours(run, {"gpus": 32}, {}).endswith(": 20 GPU hours on 8 to 32 GPUs, and 19.99 around them.")


def test_an_attempt_without_a_number_has_that_of_its_job(run: RunDir) -> None:
    job = {"job_id": "12", "nodes": 4, "gpus_per_node": 8, "submitted": f"{DAY}04:00:00+00:00"}
    write_json(run.path / "slurm" / "job.json", {"jobs": [job]})
    write_json(run.env, {"resolved": {"world_size": 8, "use_cpu": False}})
    assert "20 GPU hours on 8 to 32 GPUs" in hours(run, {"job_id": "12"}, {"job_id": "13"})


def test_attempts_without_a_number_are_left_out_and_said(run: RunDir) -> None:
    assert "4 GPU hours on 8 GPUs in 1 of 2 attempts, and 3.998 around" in hours(run, {"gpus": 8}, {})


def test_the_first_wait_begins_at_the_submission(run: RunDir) -> None:
    interrupted(run)
    entries = [
        {"job_id": str(number), "submitted": f"{DAY}{at}+00:00"} for number, at in ((1, "09:58:00"), (2, "10:01:30"))
    ]
    write_json(run.path / "slurm" / "job.json", {"jobs": entries})
    first, second = attempt_spans(read_facts(run))
    assert (first.seconds["queue"], second.seconds["queue"]) == (120.0, 60.0)
    found = drawn(run)
    assert found.begins == "2026-11-22 09:58:00 UTC"
    assert found.bars[0].parts[0] == ("queue", "0.000%", "40.000%")
    assert "2 min waiting to be started" in found.bars[0].title


@pytest.mark.parametrize("content", ["[]", "{", '{"jobs": 3}', '{"jobs": [{"job_id": "1", "submitted": "x"}]}'])
def test_a_damaged_job_file_costs_the_wait_only(run: RunDir, content: str) -> None:
    interrupted(run)
    (run.path / "slurm").mkdir()
    (run.path / "slurm" / "job.json").write_text(content)
    assert [span.seconds["queue"] for span in attempt_spans(read_facts(run))] == [0.0, 60.0]
