"""Where the time of a save goes: writing, syncing, hashing; and what the two that go on in the background cost a training.

    python benchmarks/checkpoints.py --parameters 120e6 --folder /scratch/me --out benchmarks/results/checkpoints.json

Writes what one process of the plans cpu and single writes for so many parameters in bfloat16: 2 bytes each as safetensors, 12
as AdamW's states. Then the same through `Saves`, which waits for a quick one: what of a save is not writing. The folder must lie on the disk that is asked about. Syncing depends on how much the kernel has written
by then: a disk that takes data faster than it is made has little left to sync.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.serialization import config as serialization

from sft_dist.config.schema import CheckpointConfig
from sft_dist.files import sync_path, utc_now, write_json
from sft_dist.rundir import RunDir
from sft_dist.train.manifest import BESIDE, MANIFEST, _digest, seal, settled
from sft_dist.train.ranks import Ranks
from sft_dist.train.saving import WITHOUT_CRC, Saves

TENSOR = 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=120e6)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    weights, states = made(int(given.parameters))
    root = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=given.folder))
    try:
        rounds = [one_save(root / f"checkpoint-{number}", weights, states) for number in range(given.repeats + 1)][1:]
        beside = beside_training(root / "checkpoint-0")
        waits = waits_of_saves(RunDir(root / "run"), weights, states, given.repeats)
    finally:
        shutil.rmtree(root)
    parts = {name: spread([round_[name] for round_ in rounds]) for name in rounds[0]}
    for name, (median, low, high) in parts.items():
        print(f"{name:28} {median:8.3f} ({low:.3f} to {high:.3f})")
    print("a step beside it, median s ", beside)
    print("a save beside its writing, s", waits)
    found: dict[str, Any] = {
        "time": utc_now(),
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "torch": torch.__version__,
        "parameters": int(given.parameters),
        "seconds": {name: dict(zip(("median", "lowest", "highest"), it, strict=True)) for name, it in parts.items()},
        "step_seconds": beside,
        "seconds_of_a_save_beside_its_writing": waits,
    }
    if given.out:
        write_json(given.out, found)
    else:
        print(json.dumps(found, indent=2))


def made(parameters: int) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    count = max(1, parameters // TENSOR)
    weights = {f"layer.{number}": torch.randn(TENSOR).bfloat16() for number in range(count)}
    states = {n: {name: torch.randn(TENSOR) for name in ("exp_avg", "exp_avg_sq", "master")} for n in range(count)}
    return weights, states


def one_save(folder: Path, weights: dict[str, torch.Tensor], states: dict[int, Any]) -> dict[str, float]:
    """Seconds of each part of one save into `folder`; the disk is idle when it begins."""
    os.sync()
    folder.mkdir()
    files = [folder / "model.safetensors", folder / "optimizer.pt"]
    held = {"state": states, "param_groups": []}
    torch.save(held, files[1])  # a virtual machine may get the memory of its page cache only now
    took = {}
    for crc in (True, False) if int(folder.name[-1]) % 2 else (False, True):
        files[1].unlink()
        os.sync()
        with contextlib.nullcontext() if crc else serialization.patch(WITHOUT_CRC):
            took["write torch.save" + " with CRC-32" * crc] = seconds(lambda: torch.save(held, files[1]))
    took |= {
        "write safetensors": seconds(lambda: save_file(weights, files[0])),
        "sync": seconds(lambda: [sync_path(path) for path in (*files, folder)]),
    }
    with ThreadPoolExecutor(BESIDE) as pool:
        took["hash"] = seconds(lambda: list(pool.map(_digest, files)))
    took["manifest, synced"] = seconds(lambda: seal(folder, 1, {}, [{}]))
    ours = sum(it for name, it in took.items() if "CRC-32" not in name)
    took["share that waits for no model"] = (took["sync"] + took["hash"]) / ours
    return took


def waits_of_saves(
    run: RunDir, weights: dict[str, torch.Tensor], states: dict[int, Any], repeats: int
) -> dict[str, Any]:
    """How long a save keeps the training waiting beside its writing, and how many counted when they ended."""
    saves, waits, counted = Saves(run, CheckpointConfig(), {}, Ranks()), [], 0
    for step in range(1, repeats + 1):
        os.sync()
        folder = run.checkpoints / f"checkpoint-{step}"
        with saves.save(step), serialization.patch(WITHOUT_CRC):
            wrote = seconds(
                lambda folder=folder: (
                    save_file(weights, folder / "model.safetensors"),
                    torch.save({"state": states, "param_groups": []}, folder / "optimizer.pt"),
                )
            )
        waits.append(saves.stall_s - wrote)
        counted += (folder / MANIFEST).is_file()
        saves.close()
    return {
        **dict(zip(("median", "lowest", "highest"), spread(waits), strict=True)),
        "counted_at_once": f"{counted} of {repeats}",
    }


def beside_training(folder: Path) -> dict[str, float]:
    """Median seconds of a step of matrix products on one thread: alone, and while a checkpoint is synced and hashed."""
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def step() -> float:
        return seconds(lambda: [left @ right for _ in range(10)])

    for _ in range(50):
        step()
    alone = [step() for _ in range(300)]
    beside: list[float] = []
    while len(beside) < 300:
        thread = threading.Thread(target=settled, args=(folder, Ranks()))
        thread.start()
        while thread.is_alive():
            beside.append(step())
        thread.join()
    return {"alone": round(statistics.median(alone), 5), "beside": round(statistics.median(beside), 5)}


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread(values: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(values), 4), round(min(values), 4), round(max(values), 4)


if __name__ == "__main__":
    main()
