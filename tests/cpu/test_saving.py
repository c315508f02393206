"""When a checkpoint counts: at the end of its save if it is soon on the disk and hashed, else at the end of a later step."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import TrainerState

from sft_dist.config.schema import CheckpointConfig
from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train import saving
from sft_dist.train.manifest import MANIFEST, damage
from sft_dist.train.ranks import Ranks
from sft_dist.train.saving import Saves, SavingTrainer
from sft_dist.train.step_facts import WatchedTrainer


class Meeting:
    """Where processes, here threads, exchange values."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.agreements = 0


class Threads(Ranks):
    """One of several processes, each a thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, len(meeting.values))
        object.__setattr__(self, "meeting", meeting)

    def everyones(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait(300)
        found = list(self.meeting.values)
        self.meeting.barrier.wait(300)
        return found

    def largest(self, number: int) -> int:
        if self.is_main:
            self.meeting.agreements += 1
        return max(self.everyones(number))

    def by_main(self, work: Callable[[], Any]) -> Any:
        return self.everyones(work() if self.is_main else None)[0]


class Training:
    """Two processes that save; `held` keeps the second one from hashing."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.meeting, self.held = RunDir(path), Meeting(2), threading.Event()
        self.held.set()
        ranks = [Threads(rank, self.meeting) for rank in range(2)]
        self.saves = [Saves(self.run, CheckpointConfig(), {"global_batch_size": 4}, it) for it in ranks]
        settled = saving.settled

        def slow(folder: Path, ranks: Ranks, *rest: Any) -> Any:
            if ranks.rank == 1:
                assert self.held.wait(300)
            return settled(folder, ranks, *rest)

        monkeypatch.setattr(saving, "settled", slow)

    def save(self, step: int) -> int:
        """All of them save; how often they agreed in it."""
        before = self.meeting.agreements

        def one(saves: Saves) -> None:
            with saves.save(step):
                (self.folder(step) / f"part-{saves.ranks.rank}").write_bytes(b"weights" * step)

        self.all(one)
        return self.meeting.agreements - before

    def all(self, work: Callable[[Saves], None]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, self.saves))

    def folder(self, step: int) -> Path:
        return self.run.checkpoints / f"checkpoint-{step}"

    def counts(self, step: int) -> bool:
        return damage(self.folder(step)) is None


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    made = Training(tmp_path, monkeypatch)
    yield made
    made.held.set()
    made.all(Saves.close)


def test_what_is_hashed_soon_counts_when_the_save_is_over(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "QUICK_S", 300.0)
    assert training.save(3) == 1
    assert training.counts(3)
    assert training.run.read_status()["checkpoint"] == "checkpoint-3"
    training.all(Saves.poll)
    assert training.meeting.agreements == 1, "steps after it ask for nothing"
    training.save(6)
    assert training.counts(6)


def test_what_one_process_takes_longer_for_counts_at_the_end_of_a_later_step(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "QUICK_S", 0.0)
    training.held.clear()
    training.save(3)
    training.all(Saves.poll)
    assert not (training.folder(3) / MANIFEST).exists()
    training.held.set()
    for _, thread in filter(None, (saves._pending for saves in training.saves)):
        thread.join()
    training.all(Saves.poll)
    assert training.counts(3)
    assert read_json(training.folder(3) / MANIFEST)["timed"]["settled_s"] >= 0


def test_after_one_that_took_longer_the_next_is_not_waited_for(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "QUICK_S", 0.0)
    training.held.clear()
    training.save(3)
    training.held.set()
    training.all(Saves.finish)
    monkeypatch.setattr(saving, "QUICK_S", 1e-9)
    assert training.save(6) == 0, "it waited"
    training.all(Saves.finish)
    monkeypatch.setattr(saving, "QUICK_S", 300.0)  # the last one took less: it is worth the wait again
    assert training.save(9) == 1
    assert training.counts(9)


def test_what_cannot_be_hashed_ends_the_save_on_all_processes(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, ranks: Ranks, *rest: Any) -> Any:
        if ranks.rank == 1:
            raise OSError(5, "Input/output error")
        return {}

    monkeypatch.setattr(saving, "QUICK_S", 300.0)
    monkeypatch.setattr(saving, "settled", broken)
    failed: list[str] = []

    def one(saves: Saves) -> None:
        try:
            with saves.save(3):
                (training.folder(3) / f"part-{saves.ranks.rank}").write_bytes(b"weights")
        except Exception as error:
            failed.append(type(error).__name__)

    training.all(one)
    assert sorted(failed) == ["DiskError", "WorkersFailed"]
    assert not training.folder(3).exists(), "half of it stays"


def test_replicated_states_come_to_a_gpu_through_host_memory(tmp_path: Path) -> None:
    """Loaded straight onto it they would be there twice: a run that just fits could not be resumed."""
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(8)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(schedule.state_dict(), tmp_path / "scheduler.pt")
    taken: list[torch.Tensor] = []

    class Optimizer:
        def load_state_dict(self, states: dict[str, Any]) -> None:
            taken.extend(value for state in states["state"].values() for value in state.values())

    trainer = SimpleNamespace(
        is_deepspeed_enabled=False, is_fsdp_enabled=False, args=SimpleNamespace(device=torch.device("cuda", 1)),
        optimizer=Optimizer(), lr_scheduler=schedule,
    )  # fmt: skip
    SavingTrainer._load_optimizer_and_scheduler(cast(Any, trainer), str(tmp_path))
    assert len(taken) == 3
    assert {value.device.type for value in taken} == {"cpu"}
    assert any(torch.equal(value, torch.full((8,), 0.1)) for value in taken)


def test_torch_writes_no_checksums_that_nothing_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take it as long as writing. Whoever calls torch.save elsewhere has them as before."""

    def crc(path: Path) -> int:
        torch.save({"states": torch.arange(100.0)}, path)
        return next(it.CRC for it in zipfile.ZipFile(path).infolist() if it.filename.endswith("data/0"))

    found: list[int] = []
    monkeypatch.setattr(WatchedTrainer, "_save_checkpoint", lambda *_: found.append(crc(tmp_path / "inside.pt")))
    trainer = SavingTrainer.__new__(SavingTrainer)
    trainer.state = TrainerState(global_step=3)
    trainer._save_checkpoint(None, None)
    assert found == [0]
    assert torch.equal(torch.load(tmp_path / "inside.pt", weights_only=True)["states"], torch.arange(100.0))
    assert crc(tmp_path / "outside.pt") != 0
