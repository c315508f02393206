"""A process that has joined others ends with its own status, whatever gloo's threads still hold."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.distributed.conftest import TinyRun

# Rank 0 ends while a thread of gloo is in the middle of something that takes the interpreter; here it is woken when that
# has begun to go, on a busy machine it comes so late by itself.
SCRIPT = """
import os, sys, threading
import torch
import torch.distributed as dist
from sft_dist.process import run_to_end
from sft_dist.train.ranks import leave

rank, folder, ends = int(sys.argv[1]), sys.argv[2], sys.argv[3]
wake, bell = os.pipe()
never, _ = os.pipe()
there = threading.Event()

class Last:
    def __del__(self, write=os.write, read=os.read, bell=bell, never=never):
        write(bell, b"x")
        read(never, 1)

last = Last()

def on_a_thread_of_gloo(_):
    there.set()
    os.read(wake, 1)

def main():
    global kept
    store = dist.FileStore(folder + "/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    kept = dist.group.WORLD  # as a trainer keeps it
    if rank == 1:
        store.wait(["ready"])
    work = dist.all_reduce(torch.zeros(1), async_op=True)
    if rank == 0:
        work.get_future().then(on_a_thread_of_gloo)
        store.set("ready", "yes")
        there.wait()
    else:
        work.wait()
    leave()
    return 75

sys.exit(main()) if rank == 0 and ends == "with the interpreter" else run_to_end(main)
"""


@pytest.mark.parametrize(
    ("ends", "status"), [("with the interpreter", -signal.SIGABRT), ("before it", 75)], ids=["plain", "ours"]
)
def test_a_thread_of_gloo_does_not_change_how_a_process_ends(
    ends: str, status: int, cpu_environment: Mapping[str, str], tmp_path: Path
) -> None:
    """The first case is what this guards against: where it ends with 75, run_to_end can go."""
    words = [[sys.executable, "-c", SCRIPT, str(rank), str(tmp_path), ends] for rank in (0, 1)]
    env = {**cpu_environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    first, second = (subprocess.Popen(word, **pipes) for word in words)  # type: ignore[call-overload]
    try:
        said, _ = first.communicate(timeout=120)
        second.communicate(timeout=120)
    finally:
        first.kill()
        second.kill()
    assert (first.returncode, second.returncode) == (status, 75), said


def test_a_process_that_waits_for_one_that_will_not_come_hears_a_signal(
    tiny_run: TinyRun, cpu_environment: Mapping[str, str], tmp_path: Path
) -> None:
    """It waits in C++, where no handler of Python's runs; the other one was ended by the same signal, say, as it started."""
    run = tiny_run(tmp_path, "waits", "parallel.plan=ddp", "parallel.num_processes=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    env = {**cpu_environment, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-m", "sft_dist.train", str(run.path)]
    waiting = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    try:
        while waiting.poll() is None:  # until the other one could come
            with socket.socket() as other:
                if other.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        waiting.terminate()
        _, said = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 75, said
    assert "stopped by SIGTERM while the processes met" in said
