"""`sft-dist doctor` on this machine: real processes add up numbers, and its exit status says whether they could."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sft_dist.check.gpus import look_at_gpus
from sft_dist.check.processes import look_at_processes
from sft_dist.parallel.machine import Gpu, Machine

if TYPE_CHECKING:
    from tests.conftest import RunCli

NO_GPU = Machine("a CPU", 2, False, 16.0, ())


def test_processes_here_find_each_other(run_cli: RunCli) -> None:
    done = run_cli("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (3 if any(it["level"] == "problem" for it in found) else 0), done.stderr
    assert [it["area"] for it in found if it["area"] == "processes"] == ["processes"]
    (said,) = [it["said"] for it in found if it["area"] == "processes"]
    if not any(it["area"] == "GPUs" and it["said"].startswith("GPU 1") for it in found):
        assert said.startswith("2 processes on the CPU add up 16 MiB at "), said
        assert said.endswith("over gloo")


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = look_at_processes(NO_GPU)
    assert found.level == "problem"
    assert "nosuch0" in found.said
    assert "GLOO_SOCKET_IFNAME" in str(found.fix)


def test_processes_that_take_too_long_are_ended() -> None:
    found = look_at_processes(NO_GPU, timeout_s=0.5)
    assert (found.level, found.said) == ("problem", "2 processes on the CPU had not met after 0 s")


def test_one_area_alone(run_cli: RunCli) -> None:
    done = run_cli("doctor", "--only", "packages", "--only", "compiler", "--json")
    assert {it["area"] for it in json.loads(done.stdout)} == {"packages", "compiler"}
    wrong = run_cli("doctor", "--only", "pakages")
    assert wrong.returncode == 2
    assert "areas: packages, host" in wrong.stderr


def test_what_is_wrong_is_on_the_screen_with_status_3(run_cli: RunCli) -> None:
    done = run_cli("doctor", "--quick", env={"SFT_DIST_CACHE": "/proc/cache"})
    assert done.returncode == 3
    assert "PROBLEM  folders:     cache: /proc/cache" in done.stdout
    assert "name another by SFT_DIST_CACHE" in done.stdout
    assert "1 problem: a run on this machine would fail" in done.stderr
    assert "processes:" not in done.stdout


def test_a_torch_that_cannot_use_the_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    machine = Machine("a CPU", 2, False, 16.0, (Gpu("NVIDIA H100 80GB HBM3", 79.6, 9.0),))
    (found,) = look_at_gpus(machine)
    assert (found.level, "is a build for CPUs, and this machine has GPUs: 1" in found.said) == ("problem", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = look_at_gpus(machine)
    assert (found.level, "for CUDA 13.0 cannot use the GPUs" in found.said) == ("problem", True)
    assert "driver" in str(found.fix)


def test_a_machine_without_gpus_trains_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert [(it.level, it.said) for it in look_at_gpus(NO_GPU)] == [("ok", "none; runs train on the CPU")]
