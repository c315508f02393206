"""What a model was asked and what came back, kept batch by batch: an evaluation that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_dist.config.schema import GenerationConfig
from sft_dist.files import append_jsonl, read_jsonl

log = logging.getLogger(__name__)
# Seconds between two lines on how far it is.
EVERY_S = 30.0
# Prompts at once. A GPU that generates waits for its host, and takes 64 in hardly more time (benchmarks/evaluate.py --engines).
PROMPTS, PROMPTS_OF_GPU = 16, 64


class Asked:
    """Answers by what was asked, in a JSON Lines file.

    `identity` is anything that JSON can hold and that says which model answers; what another model said stays out.
    Several processes may answer a share each: the one at `place` above 0 keeps its answers in a file of its own.
    """

    def __init__(self, path: Path, identity: Any, seed: int = 0, place: int = 0) -> None:
        self.seed = seed
        self._main, self._path = path, path if place == 0 else path.with_suffix(f".{place}{path.suffix}")
        self._identity = identity
        self._share = (0, 1)
        self._known = {row["key"]: row["value"] for row in read_jsonl(path) if "key" in row}
        if place == 0:
            self.gather()

    @contextmanager
    def only(self, place: int, processes: int) -> Iterator[None]:
        """Inside, batches whose number does not leave `place` when divided by `processes` are others' to answer."""
        self._share = (place, processes)
        try:
            yield
        finally:
            self._share = (0, 1)

    def is_mine(self, number: int) -> bool:
        place, processes = self._share
        return number % processes == place

    def gather(self) -> None:
        """Take over what other processes have answered; their files go."""
        for path in sorted(self._main.parent.glob(f"{self._main.stem}.*{self._main.suffix}")):
            for row in read_jsonl(path):
                if "key" in row:
                    self.keep(row["key"], row["value"])
            path.unlink()

    def key(self, *what: Any) -> str:
        """The name under which the answer to `what` is kept."""
        text = json.dumps([self._identity, *what], sort_keys=True, ensure_ascii=False, default=list)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:20]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, key: str, value: Any) -> None:
        if key not in self._known:
            append_jsonl(self._path, {"key": key, "value": value})
            self._known[key] = value


def prompts_at_once(options: GenerationConfig, *, generates_on_gpu: bool) -> int:
    """`evaluate.generation.batch_size`, with what `auto` is."""
    if options.batch_size != "auto":
        return options.batch_size
    return PROMPTS_OF_GPU if generates_on_gpu else PROMPTS


def by_batches(
    lengths: Sequence[int],
    batch_size: int,
    compute: Callable[[list[int]], Sequence[Any]],
    asked: Asked | None = None,
    keys: Sequence[str] = (),
) -> list[Any]:
    """What `compute` returns for the indices of each batch, in the order of `lengths`, by which they share batches.

    A batch for which memory does not suffice is computed in halves. One that is in `asked` as a whole, by the `keys`, is not
    computed again: the others stay those of a run that nobody interrupted, and with them every last bit of the numbers.
    Batches that are others' to answer are None.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    results: list[Any] = [None] * len(lengths)
    said = time.monotonic()
    for number, start in enumerate(range(0, len(order), batch_size)):
        batch = order[start : start + batch_size]
        if asked is not None and not asked.is_mine(number):
            continue
        if asked is not None and all(keys[index] in asked for index in batch):
            found: Sequence[Any] = [asked[keys[index]] for index in batch]
        else:
            found = _in_parts(compute, batch)
        for index, value in zip(batch, found, strict=True):
            results[index] = value
            if asked is not None:
                asked.keep(keys[index], value)
        if time.monotonic() - said > EVERY_S:
            said = time.monotonic()
            log.info("asked %d of %d", start + len(batch), len(order))
    return results


def _in_parts(compute: Callable[[list[int]], Sequence[Any]], batch: list[int]) -> Sequence[Any]:
    """What `compute` returns for the batch; where memory does not suffice, for its first half and then for the second."""
    import torch

    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Not in the handler: what the failed computation holds is let go of with its exception.
    half = len(batch) // 2
    log.warning("no memory for %d prompts at once: %d; see evaluate.generation.batch_size", len(batch), half)
    torch.cuda.empty_cache()
    return [*_in_parts(compute, batch[:half]), *_in_parts(compute, batch[half:])]
