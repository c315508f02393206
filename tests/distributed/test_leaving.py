"""A process that has joined others ends with its own status, whatever gloo's threads still hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

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
