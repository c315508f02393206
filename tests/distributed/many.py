"""Train several runs one after the other in the same processes: `python many.py 2 RUN_DIR[@STEP:RANK][%STEP:RANK][!STEP:RANK]... / 2x2 RUN_DIR...`.

Starting Python, torch and TRL takes longer than training a tiny model, so they are imported once, and the processes of a
world (2, then 2 on each of 2 nodes) are forks of this one, with the environment that torchrun gives its workers. Between runs the
state that accelerate and transformers keep in modules is put back to its start. With @STEP:RANK that one process gets a
SIGTERM in this step; a run that is named again afterwards goes on. With %STEP:RANK that one process's loss is not a number in
this step. With !STEP:RANK that one process finds the disk full when it saves at this step. A run that sft-dist refuses is left as it is, and the
next one follows.

DeepSpeed's tool for universal checkpoints is a fork as well, where the package starts a process of its own.

Beside what a worker writes, each run gets forwards.json: how often a decoder layer computed its forward pass.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, as resolve_here does it.
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import torch
from deepspeed.checkpoint import ds_to_universal

from sft_dist.config.loader import load_run_config
from sft_dist.errors import RunStopped, SftDistError, explained
from sft_dist.evaluate.asking import asking
from sft_dist.files import write_json
from sft_dist.logs import log_to_stderr
from sft_dist.parallel.world import this_world
from sft_dist.rundir import RunDir
from sft_dist.train import arguments, callbacks, publish, saving, trainer, universal  # noqa: F401
from sft_dist.train.attempt import attempt, joined
from sft_dist.train.ranks import Ranks, join, leave
from sft_dist.train.settle import record_environment, resolve_here
from sft_dist.train.worker import train


def main() -> int:
    log_to_stderr()
    gc.collect()
    gc.freeze()  # what was imported is never garbage; looking through it took 0.6 s before each run
    for slash, words in itertools.groupby(sys.argv[1:], lambda word: word == "/"):
        if not slash:
            size, *arms = words
            nodes, _, each = size.rpartition("x")
            if not fork(int(nodes or 1), int(each), arms):
                return 1
    return 0


def fork(nodes: int, each: int, arms: list[str]) -> bool:
    """Train `arms` in `each` processes on so many nodes, as far as they can tell; whether all of them ended well.

    When one fails the others are killed.
    """
    size = nodes * each
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = set()
    for rank in range(size):
        worker = os.fork()
        if worker == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank % each, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": each}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in {**world, **meeting}.items()})
            code = 1
            try:
                code = train_all(arms)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        workers.add(worker)
    well = True
    while workers:
        ended, status = os.wait()
        workers.discard(ended)
        if status and well:
            well = False
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
    return well


def train_all(arms: list[str]) -> int:
    """What one process does: every run in turn."""
    universal.run_tool = fork_tool
    for argument in arms:
        argument, _, full = argument.partition("!")
        rest, _, poison = argument.partition("%")
        folder, _, stop = rest.partition("@")
        forget()
        run = RunDir(Path(folder))
        world, config = this_world(), load_run_config(run.config)
        # Without it a plan for GPUs would be refused here; the runs do not say it, since some go on with another number.
        counted = config.parallel.model_copy(update={"num_processes": world.local_size})
        resolved = resolve_here(config.model_copy(update={"parallel": counted}), run=run)
        ranks = join(world, use_cpu=resolved.use_cpu)
        forwards = count_forwards()
        terminate_at(stop, ranks)
        poison_at(poison, ranks)
        fill_disk_at(full, ranks)
        try:
            with attempt(run) if ranks.is_main else joined(run, reports=False) as current:
                if ranks.is_main:
                    record_environment(run, resolved)
                train(run, current, resolved, ranks, asking(run, resolved, current, ranks))
        except RunStopped:
            pass
        except SftDistError as error:
            sys.stderr.write(explained(error) if ranks.is_main else "")
        except Exception:
            traceback.print_exc()
            return 1  # the other processes may wait in a collective that never comes
        ranks.barrier()  # the main one writes status.json last
        if ranks.is_main:
            write_json(run.path / "forwards.json", forwards[0])
    leave()
    return 0


def fork_tool(checkpoint: Path, shards: str) -> None:
    """As universal.run_tool, without starting Python and importing DeepSpeed again."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(checkpoint)
            folders = ["--input_folder", shards, "--output_folder", f"{universal.PARTIAL}/{universal.UNIVERSAL}"]
            alone = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
            sys.argv = ["ds_to_universal", "--inject_missing_state", *folders, *alone]
            ds_to_universal.main(ds_to_universal.parse_arguments())
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def forget() -> None:
    """What the run before left behind in this process."""
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        os.environ.pop(name)
    gc.collect()
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    unset_hf_deepspeed_config()


def count_forwards() -> list[int]:
    """A number, in a list, that goes up with each forward pass of a decoder layer from now on, by its MLP.

    The layer's own forward method would not do: transformers wraps it, so that a recomputation does not go through it.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = getattr(LlamaMLP.forward, "plain", LlamaMLP.forward)
    count = [0]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return plain(self, *args, **kwargs)

    forward.plain = plain  # type: ignore[attr-defined]
    LlamaMLP.forward = forward
    return count


def terminate_at(stop: str, ranks: Ranks) -> None:
    """`stop` is STEP:RANK, or nothing."""
    recorder = callbacks.RunRecorder
    plain = getattr(recorder.on_step_end, "plain", recorder.on_step_end)
    step, _, rank = stop.partition(":")

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stop and (state.global_step, ranks.rank) == (int(step), int(rank)):
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, args, state, control, **kwargs)

    on_step_end.plain = plain  # type: ignore[attr-defined]
    recorder.on_step_end = on_step_end


def poison_at(where: str, ranks: Ranks) -> None:
    """`where` is STEP:RANK, or nothing."""
    kind = trainer.Trainer
    plain = getattr(kind.compute_loss, "plain", kind.compute_loss)
    step, _, rank = where.partition(":")

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        here = where and (self.state.global_step + 1, ranks.rank) == (int(step), int(rank))
        return loss * float("nan") if here and self.model.training else loss

    compute_loss.plain = plain  # type: ignore[attr-defined]
    kind.compute_loss = compute_loss


def fill_disk_at(where: str, ranks: Ranks) -> None:
    """`where` is STEP:RANK, or nothing."""
    kind = saving.Saves
    plain = getattr(kind.save, "plain", kind.save)
    step, _, rank = where.partition(":")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def save(self: Any, at: int) -> Iterator[None]:
        write = torch.save
        if where and (at, ranks.rank) == (int(step), int(rank)):
            torch.save = refuse
        try:
            with plain(self, at):
                yield
        finally:
            torch.save = write

    save.plain = plain  # type: ignore[attr-defined]
    kind.save = save


if __name__ == "__main__":
    sys.exit(main())
