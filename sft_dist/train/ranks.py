"""The processes of one training, and what they tell each other beside the gradients."""

from __future__ import annotations

import datetime
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sft_dist.errors import PreflightError, SftDistError, exit_status
from sft_dist.parallel.world import World

if TYPE_CHECKING:
    import torch.distributed as dist

# How long the others wait while one process prepares rows or writes a model: longer than any of it takes.
PATIENCE = datetime.timedelta(hours=12)

T = TypeVar("T")


class MainFailed(SftDistError):
    """On the other processes: the main one failed at what they wait for. It says why; they end with its exit code."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its training. Messages go over a gloo group of their own: no GPU waits for them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.group is not None:
            import torch.distributed as dist

            dist.barrier(self.group)

    def largest(self, number: int) -> int:
        """The largest of every process's `number`; all of them must ask at the same point."""
        if self.group is None:
            return number
        import torch
        import torch.distributed as dist

        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def by_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, on every process; it must be possible to pickle it.

        An error that it raises there is MainFailed on the others, which else would wait for it or report a lost peer.
        """
        if self.group is None:
            return work()
        import torch.distributed as dist

        box: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_main:
            try:
                box[0] = work()
            except BaseException as caught:
                error, box[1] = caught, exit_status(caught)
        dist.broadcast_object_list(box, src=0, group=self.group)
        if error is not None:
            raise error
        if box[1] is not None:
            failed = MainFailed("the main process failed")
            failed.exit_code = box[1]
            raise failed
        value: T = box[0]
        return value

    def everyones(self, value: Any) -> list[Any]:
        """Every process's `value`, in the order of their ranks."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def join(world: World, *, use_cpu: bool) -> Ranks:
    """Meet the other processes of `world`; a process that no launcher started is alone.

    Raises PreflightError on a process that computes on another kind of device than the main one.
    """
    if not world.launched:
        return Ranks()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        if not use_cpu:
            torch.cuda.set_device(world.local_rank)
        store, rank, size = next(rendezvous("env://"))
        _on_one_kind_of_device(store, world, use_cpu=use_cpu)
        # Both backends: FSDP's offload to the host and DeepSpeed's checkpoints also talk about tensors on the CPU.
        backend = "gloo" if use_cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Ranks(world.rank, world.size, dist.new_group(backend="gloo", timeout=PATIENCE))


def _on_one_kind_of_device(store: Any, world: World, *, use_cpu: bool) -> None:
    """PreflightError unless the main process computes on the same kind: the processes would wait for each other in vain."""
    mine = "the CPU" if use_cpu else "GPUs"
    if world.rank == 0:
        store.set("sft_dist/device", f"{mine}@{socket.gethostname()}")
        return
    theirs, _, host = store.get("sft_dist/device").decode().partition("@")
    if theirs != mine:
        raise PreflightError(
            f"the main process (on {host}) computes on {theirs}, but this one (on {socket.gethostname()}) on {mine}",
            hint="look at nvidia-smi and CUDA_VISIBLE_DEVICES on both, or set parallel.plan=cpu",
        )


def tell_deepspeed(*, use_cpu: bool) -> None:
    """Let DeepSpeed take over the processes that have met; by itself it looks for them only once it has a model."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo" if use_cpu else "nccl", auto_mpi_discovery=False)


def leave() -> None:
    """Take the process groups down, so that no process reports the others as lost."""
    if has_met():
        sys.modules["torch"].distributed.destroy_process_group()


def has_met() -> bool:
    """Whether this process has joined others; does not import torch for the answer."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and bool(torch.distributed.is_initialized())
