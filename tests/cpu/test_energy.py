"""What GPUs have used: as NVML says it, where it says it, and on record for each attempt."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_dist import stages
from sft_dist.files import read_jsonl
from sft_dist.report.facts import read_facts
from sft_dist.report.timeline import timeline
from sft_dist.rundir import RunDir
from sft_dist.train import callbacks, energy


class Library:
    """As much of NVML as is asked; `status` is what the GPU answers when it is asked for its energy."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.asked, self.open = status, b"", 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        self.asked = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, count: Any) -> int:
        count._obj.value = 7_200_000
        return self.status


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab-12"))


@pytest.mark.parametrize(("status", "expected"), [(0, 7200.0), (3, None)], ids=["counts", "not supported"])
def test_a_gpu_is_asked_by_its_own_name(
    status: int, expected: float | None, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(status)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert energy.joules(use_cpu=False) == expected
    assert (library.asked, library.open) == (b"GPU-ab-12", 0)


def test_without_gpu_or_library_nothing_is_known(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "LIBRARY", "libnosuch.so.9")
    assert energy.joules(use_cpu=False) is None
    monkeypatch.setattr(energy, "LIBRARY", None)
    assert energy.joules(use_cpu=True) is None, "a GPU that somebody else uses"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy.joules(use_cpu=False) is None


def test_each_attempt_says_what_it_used(new_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([1000.0, 1000.0 + 1.8e6])
    monkeypatch.setattr(callbacks, "joules", lambda **how: next(counted))
    words = (
        "train.max_steps=2",
        "evaluate.before=false",
        "evaluate.after=false",
        "evaluate.data=null",
        "evaluate.labels=[]",
    )
    run = new_run(*words)
    stages.run_here(run)
    (line,) = read_jsonl(run.attempts)
    assert (line["energy_kwh"], line["gpus"]) == (0.5, 0), "and how many GPUs it had, which GPU hours are counted by"
    found = timeline(read_facts(run))
    assert found is not None
    assert found.summary.endswith("The GPUs used 0.5 kWh while training.")
