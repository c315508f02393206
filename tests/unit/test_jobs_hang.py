"""When a process counts as hung, and which one the others wait for: with made-up beats and clocks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sft_dist.jobs import beats
from sft_dist.jobs.beats import Beat, Pulse, read_beats
from sft_dist.jobs.hang import (
    CEILING_S,
    FIRST_STEPS_S,
    FLOOR_S,
    GAP_S,
    LIMITS,
    Seen,
    Watch,
    culprits,
    limit_s,
    reason,
    seen_from,
)


def beat(rank: int = 0, count: int = 1, phase: str = "step", step: int = 7, **rest: float) -> Beat:
    return Beat(pid=100 + rank, rank=rank, count=count, step=step, phase=phase, **rest)


def seen(rank: int, phase: str = "step", step: int = 7, seconds: float = 400.0, **rest: object) -> Seen:
    values = {"state": "S", "limit_s": 300.0, **rest}
    return Seen(rank, f"n{rank // 2 + 1}", 100 + rank, step, phase, seconds, **values)  # type: ignore[arg-type]


# --- the beat --------------------------------------------------------------------------------------------------------


def test_what_is_beaten_is_read(tmp_path: Path) -> None:
    pulses = [Pulse(tmp_path, rank) for rank in (1, 0)]
    pulses[0].beat("step", 3)
    first, second = read_beats(tmp_path)
    assert (first.rank, first.phase, first.step, first.pid) == (0, "start", 0, os.getpid())
    assert (second.rank, second.phase, second.step) == (1, "step", 3)
    pulses[0].beat()
    assert read_beats(tmp_path)[1].count == second.count + 1
    pulses[0].end()
    pulses[0].beat()  # nobody listens any more
    assert read_beats(tmp_path)[1].phase == "ended"


def test_the_usual_step_is_a_median_without_the_first_one(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 0)
    pulse.step_took(60.0)  # it compiled
    assert pulse.step_s == 0.0
    for seconds in (1.0, 1.2, 9.0, 1.1):
        pulse.step_took(seconds)
    assert pulse.step_s == pytest.approx(1.15)


def test_foreign_and_torn_files_are_passed_over(tmp_path: Path) -> None:
    Pulse(tmp_path, 0)
    (tmp_path / "rank-1").write_bytes(b"")
    (tmp_path / "rank-2").write_bytes(b"x" * 4096)
    (tmp_path / "nccl-0.pipe").write_bytes(b"")
    assert [one.rank for one in read_beats(tmp_path)] == [0]
    assert read_beats(tmp_path / "gone") == []


def test_a_folder_is_made_and_goes() -> None:
    folder = beats.make_folder()
    Pulse(folder, 0)
    assert folder.stat().st_mode & 0o077 == 0, "others could beat for us"
    beats.remove_folder(folder)
    assert not folder.exists()
    beats.remove_folder(folder)


def test_the_last_one_whose_launcher_is_gone_removes_the_folder() -> None:
    mine, orphaned = beats.make_folder(), beats.make_folder()
    gone = subprocess.Popen(["true"])
    gone.wait()
    orphaned = orphaned.rename(str(orphaned).replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
    for folder in (mine, orphaned):
        pulses = [Pulse(folder, rank) for rank in range(2)]
        pulses[0].end()
        assert folder.exists()
        pulses[1].end()
    assert mine.exists()
    assert not orphaned.exists()
    beats.remove_folder(mine)


def test_what_was_left_behind_long_ago_goes() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    orphaned, mine = beats.make_folder(), beats.make_folder()
    orphaned = orphaned.rename(str(orphaned).replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
    beats.remove_folder(beats.make_folder())
    assert orphaned.exists(), "it may be another container's"
    for folder in (orphaned, mine):
        os.utime(folder, (0, 0))
    beats.remove_folder(beats.make_folder())
    assert not orphaned.exists()
    assert mine.exists()
    beats.remove_folder(mine)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "timeout", "step_s", "save_s", "limit"),
    [
        ("step", "auto", 0.0, 0.0, FIRST_STEPS_S),  # nothing is known yet
        ("step", 3.0, 0.0, 0.0, FIRST_STEPS_S),  # nor does a short limit apply to what compiles
        ("step", "auto", 0.5, 0.0, FLOOR_S),  # file servers pause
        ("data", "auto", 30.0, 0.0, 600.0),  # 20 steps
        ("optimizer", "auto", 100.0, 0.0, CEILING_S),  # before torch's own 1800 s
        ("step", "auto", 1000.0, 0.0, 3000.0),  # three such steps are no hang
        ("step", 3.0, 0.5, 0.0, 3.0),
        ("step", 5000, 0.5, 0.0, 5000.0),
        ("evaluate", 3.0, 0.5, 0.0, FLOOR_S),
        ("evaluate", "auto", 30.0, 0.0, 600.0),
        ("save", "auto", 0.5, 0.0, LIMITS["save"]),
        ("save", "auto", 0.5, 10.0, FLOOR_S),
        ("save", "auto", 0.5, 200.0, 1000.0),
        ("save", 1200, 0.5, 10.0, 1200.0),
        ("start", 3.0, 0.0, 0.0, LIMITS["start"]),
        ("publish", 9999, 1.0, 1.0, 9999.0),
        ("ended", "auto", 1.0, 1.0, float("inf")),
        ("step", None, 1.0, 1.0, float("inf")),
    ],
)
def test_the_limit_follows_from_what_was_measured(
    phase: str, timeout: object, step_s: float, save_s: float, limit: float
) -> None:
    assert limit_s(beat(phase=phase, step_s=step_s, save_s=save_s), timeout) == limit  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("phase", "timeout", "limit"),
    [
        ("save", 3.0, 3.0),
        ("evaluate", 3.0, 3.0),
        ("save", "auto", 600.0),
        ("start", 3.0, LIMITS["start"]),  # nothing measured says how long a step takes
        ("ended", 3.0, float("inf")),
        ("save", None, float("inf")),
    ],
)
def test_what_somebody_has_stopped_waits_for_no_file_server(phase: str, timeout: object, limit: float) -> None:
    assert limit_s(beat(phase=phase, step_s=30.0, save_s=10.0), timeout, stopped=True) == limit  # type: ignore[arg-type]


# --- the watch -------------------------------------------------------------------------------------------------------


def test_a_silent_process_is_late_once_its_limit_has_passed() -> None:
    watch = Watch(expected=2, timeout=10.0)
    for now in range(11):
        watch.see([beat(0, count=now, step_s=1.0), beat(1, step_s=1.0)], float(now))
        assert watch.late() == ([1] if now >= 10 else [])
    watch.see([beat(1, count=2, step_s=1.0)], 11.0)
    assert watch.late() == []
    assert watch.seconds[1] == 0.0


def test_time_in_which_the_launcher_did_not_run_either_does_not_count() -> None:
    """`scontrol suspend` stops all processes of a job; when they go on, an hour has passed."""
    watch = Watch(expected=1, timeout=10.0)
    watch.see([beat(step_s=1.0)], 0.0)
    watch.see([beat(step_s=1.0)], 3600.0)
    assert watch.seconds == {0: GAP_S}
    assert watch.late() == []


def test_a_process_that_was_stopped_in_a_save_is_late_like_one_in_a_step() -> None:
    watch = Watch(1, 3.0)
    for now in range(6):
        watch.see([beat(phase="save", step_s=0.5, save_s=0.1)], float(now))
        assert watch.late(lambda pid: "S") == [], "a file server may pause"
        assert watch.late(lambda pid: "T") == ([0] if now >= 3 else [])
    assert watch.quiet()
    assert [one.limit_s for one in watch.seen("n1", lambda pid: "T")] == [3.0]
    assert [one.limit_s for one in watch.seen("n1", lambda pid: "D")] == [FLOOR_S]


def test_a_process_that_began_anew_is_not_late() -> None:
    watch = Watch(expected=1, timeout=2.0)
    for now in range(5):
        watch.see([Beat(pid=100 + now, rank=0, count=1, step=0, phase="step", step_s=1.0)], float(now))
    assert watch.late() == []


def test_processes_that_never_come_are_missed_in_the_end() -> None:
    watch = Watch(expected=2, timeout="auto")
    now = 0.0
    while now <= LIMITS["start"] + 1:
        assert watch.missing() == (now > LIMITS["start"])
        watch.see([beat(0, count=int(now))], now)
        now += 1.0
    assert watch.late() == []
    off = Watch(expected=2, timeout=None)
    off.see([], 0.0)
    off.waited = 1e9
    assert not off.missing()


def test_the_board_is_read_only_when_it_is_quiet() -> None:
    watch = Watch(expected=1, timeout="auto")
    for now in range(9):
        watch.see([beat(step_s=1.0)], float(now))
        assert not watch.quiet()
    watch.see([beat(step_s=1.0)], 12.0)
    assert watch.quiet()
    watch.see([beat(count=2, phase="ended")], 13.0)
    watch.see([beat(count=2, phase="ended")], 18.0)
    watch.see([beat(count=2, phase="ended")], 23.0)
    watch.see([beat(count=2, phase="ended")], 28.0)
    assert not watch.quiet(), "it has ended, and says nothing for ever"


# --- who it is -------------------------------------------------------------------------------------------------------


def test_the_one_behind_is_the_culprit() -> None:
    found, sign = culprits([seen(0, step=8), seen(1, step=8), seen(2, step=7), seen(3, step=8)])
    assert ([one.rank for one in found], sign) == ([2], "behind the others")
    found, _ = culprits([seen(0, "save"), seen(1, "data"), seen(2, "data")])
    assert [one.rank for one in found] == [0], "a save comes before the next batch of the same step"
    found, _ = culprits([seen(0, "load", step=0), seen(1, "data", step=0)])
    assert [one.rank for one in found] == [0]
    found, _ = culprits([seen(0, "publish"), seen(1, "optimizer", step=9)])
    assert [one.rank for one in found] == [1]


def test_a_stopped_one_is_the_culprit_wherever_it_is() -> None:
    found, sign = culprits([seen(0, step=7), seen(1, step=8, state="T")])
    assert [one.rank for one in found] == [1]
    assert "stopped" in sign


def test_at_the_same_place_stacks_and_the_kernel_tell_them_apart() -> None:
    found, sign = culprits([seen(0, waits=True), seen(1, waits=False), seen(2, waits=None)])
    assert [one.rank for one in found] == [1]
    assert "collective" in sign
    found, sign = culprits([seen(0), seen(1, state="D")])
    assert [one.rank for one in found] == [1]
    assert "disk" in sign
    assert culprits([seen(0, state="D"), seen(1, state="D")]) == ([], "")
    assert culprits([seen(0, waits=True), seen(1, waits=True)]) == ([], "")
    assert culprits([seen(0, waits=False), seen(1, waits=False)]) == ([], "")


def test_those_that_have_ended_are_not_waited_for() -> None:
    found, _ = culprits([seen(0, "ended"), seen(1, "publish"), seen(2, "step", state="Z")])
    assert [one.rank for one in found] == [1]
    assert culprits([]) == ([], "")


def test_the_reason_names_rank_host_phase_and_time() -> None:
    text = reason([seen(0, step=8), seen(2, step=7, seconds=312.4)], "stacks in logs/hang-n1.txt")
    assert text == (
        "hang: rank 2 (process 102 on n2) is in phase step after step 7 for 312 s, behind the others (limit 300 s); "
        "stacks in logs/hang-n1.txt"
    )
    together = reason([seen(0, "data"), seen(1, "data", seconds=401)], "x")
    assert together == (
        "hang: all 2 ranks, none behind the others, longest rank 1 (process 101 on n1), are in phase data after step 7 "
        "for 401 s (limit 300 s); x"
    )
    many = reason([seen(rank, step=7) for rank in range(20)] + [seen(20, step=8)], "x")
    assert "rank 0 (" in many
    assert "as are ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more" in many
    assert len(many) < 300


def test_the_reason_takes_the_limit_from_the_one_that_ran_into_it() -> None:
    """The culprit's own limit may be longer: it saves, and the others wait for its next step."""
    saving = seen(0, "save", seconds=350, limit_s=1800)
    text = reason([saving, seen(1, "data", seconds=301)], "x")
    assert "rank 0" in text
    assert "(limit 300 s)" in text


def test_what_a_node_says_on_the_board_comes_back_whole() -> None:
    one = seen(3, waits=True, limit_s=float("inf"))
    back = seen_from(json.loads(json.dumps(one.facts())))
    assert back.rank == 3
    assert back.waits is True
    assert back.limit_s == 1e9
    assert seen_from({**one.facts(), "a later version says": 1}).host == one.host
