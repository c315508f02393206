"""The order of rows, and the rows that fill an epoch's last step, so that every plan trains the same steps; their batches."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler

from sft_dist.train import loss

if TYPE_CHECKING:
    from datasets import Dataset

    from sft_dist.parallel.resolve import Resolved

# The column of tokens' weights; only data in which some trained token counts other than once has it.
WEIGHTS = "loss_weights"


def filled(dataset: Dataset, multiple: int, token: int) -> Dataset:
    """`dataset` with rows of one untrained token at its end, until their number is a multiple of `multiple`.

    accelerate would fill the last step (or batch of an evaluation) from the first rows instead, which then count twice,
    and more of them the more processes there are. A filling row carries no loss, and the loss is divided by trained tokens.
    """
    from datasets import concatenate_datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    rows: dict[str, Any] = {"input_ids": [[token]] * missing, "labels": [[-100]] * missing}
    if "seq_lengths" in dataset.features:
        rows["seq_lengths"] = [[1]] * missing
    if WEIGHTS in dataset.features:
        rows[WEIGHTS] = [[0.0]] * missing
    return concatenate_datasets([dataset, type(dataset).from_dict(rows, features=dataset.features)])


def rows_of_whole_steps(resolved: Resolved) -> int:
    """Rows that make a whole number of steps, and of micro batches on each process."""
    layout, micro = resolved.layout, resolved.per_device_train_batch_size
    return micro * math.lcm(resolved.gradient_accumulation_steps * layout.data_parallel_size, layout.world_size)


def is_filling(row: dict[str, list[int]]) -> bool:
    """Whether a row is one of those; no other row has only one token, since the first one is never predicted."""
    return len(row["input_ids"]) == 1


class Collator:
    """TRL's collator, and beside its columns what the one-pass loss needs of a batch."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], *, cuts_rows: bool) -> None:
        self.collate, self.cuts_rows = collate, cuts_rows

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        if WEIGHTS in rows[0]:
            batch["weights"] = loss.as_bits(_weights_ahead(rows, batch["labels"]))
        # Ulysses cuts the rows of a batch between processes, and knows nothing of what else is in it.
        return batch if self.cuts_rows else {**loss.with_targets(batch), "filling": sum(map(is_filling, rows))}


def _weights_ahead(rows: list[dict[str, Any]], labels: torch.Tensor) -> torch.Tensor:
    """The weights in the shape of `labels`, each where its token is to be predicted: one before it."""
    given = [torch.tensor(row[WEIGHTS], dtype=torch.float32) for row in rows]
    weights = torch.zeros(labels.shape, dtype=torch.float32)
    for place, own in enumerate(given if len(given) == len(labels) else [torch.cat(given)]):
        weights[place, : len(own)] = own
    return F.pad(weights[:, 1:], (0, 1))


class EpochOrder(Sampler[int]):
    """A random order of the rows for each epoch, the same on every process, and the filling rows last."""

    def __init__(self, rows: int, filling: int, seed: int) -> None:
        self.rows, self.filling, self.seed, self.epoch = rows, filling, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader when an epoch begins, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.filling

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, self.rows + self.filling)


def begin_each_epoch_anew(loader: Any, *, cuts_rows: bool) -> None:
    """Have every epoch its own order, also one that a resume begins in its middle (`_skip_first_batches`).

    With `cuts_rows` mend DeepSpeed's loader of shared rows (0.19.8, UlyssesSPDataLoaderAdapter) in place. Trainer stops after an epoch's last batch and so never meets the end at which that loader begins again: the first
    step of every later epoch was left out, and the order never changed. Can go when the loader does the same.
    """
    from transformers import trainer

    trainer.skip_first_batches = _skip_first_batches  # Trainer knows it by the name in its module only
    if not cuts_rows:
        return
    kind = type(loader)

    def begin(self: Any) -> Any:
        self.micro_batches.clear()
        self.iter = iter(self.dl)
        return self

    def set_epoch(self: Any, epoch: int) -> None:
        self.dl.set_epoch(epoch)

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": begin, "set_epoch": set_epoch})


def _skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
    """As accelerate's (1.15), but what is left of an epoch keeps that epoch's order, and shared rows are skipped, too.

    accelerate's set_epoch does not look for the sampler where a skip stands around a share of the batches, so that the
    second epoch of several processes went on in the order of the first. And its skip asks for `dataset`, and so fails with
    AttributeError for a loader of shared rows. Can go when both are mended there. A loader of shared rows yields each batch of the one inside it in as many turns as processes share a row.
    """
    if not hasattr(loader, "micro_batches"):
        return _skipped(loader, num_batches)
    batches, turns = divmod(num_batches, loader.sp_world_size)
    rest = copy.copy(loader)
    rest.dl, rest.micro_batches = _skipped(loader.dl, batches), deque()
    kind = type(loader)

    def begin(self: Any) -> Any:
        kind.__iter__(self)
        for _ in range(turns):
            next(self)
        return self

    rest.__class__ = type(kind.__name__, (kind,), {"__iter__": begin})
    return rest


def _skipped(loader: Any, num_batches: int) -> Any:
    """accelerate's skip, whose batches pass a new epoch on to the order of the rows."""
    from accelerate import skip_first_batches

    rest = skip_first_batches(loader, num_batches)
    around: Any = getattr(rest, "batch_sampler", None)
    inside: Any = around
    while inside is not None and not isinstance(getattr(inside, "sampler", None), EpochOrder):
        inside = getattr(inside, "batch_sampler", None)
    if around is not None and inside is not None:
        around.set_epoch = inside.sampler.set_epoch
    return rest
