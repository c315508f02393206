"""Processes that turn chunks of rows into shards.

Neither of the standard library's pools: multiprocessing's replaces a process that is killed and waits for its work for ever,
concurrent.futures' leaves its processes behind when this one is killed, and Python before 3.11.6 can hang in it after a death.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from sft_dist.data.shards import Chunk
from sft_dist.errors import SftDistError


def made(make: Callable[[Chunk], int], chunks: Iterator[Chunk], processes: int) -> Iterator[int]:
    """Call `make` with each chunk in so many processes; yields what it returns, in the order in which they end.

    Besides the chunk that each process works on one is held here. Raises SftDistError if a process is killed.
    """
    if processes == 1:
        yield from map(make, chunks)
        return
    with _workers(make, processes) as workers:
        idle, working = list(workers), dict[Connection, Any]()
        chunk = next(chunks, None)
        while chunk is not None or working:
            while idle and chunk is not None:
                connection = idle.pop()
                working[connection] = workers[connection]
                with contextlib.suppress(OSError):  # it was killed: said when its answer is read
                    connection.send(chunk)
                chunk = next(chunks, None)
            for ready in wait(list(working)):
                assert isinstance(ready, Connection), "only these are waited for"
                yield _answer(ready, working.pop(ready))
                idle.append(ready)


@contextlib.contextmanager
def _workers(make: Callable[[Chunk], int], count: int) -> Iterator[dict[Connection, Any]]:
    """Forks of this process by their connections; they end with it, however it ends."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    # Each process is a fork with one thread: the tokenizer's own threads would wait for each other.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    found: dict[Connection, Any] = {}
    # What the collector does not walk through in a fork stays shared: else each would copy what libraries have made.
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            found[ours] = context.Process(target=_work, args=(make, theirs, [*found, ours]), daemon=True)
            found[ours].start()
            theirs.close()
        if not frozen:
            gc.unfreeze()
        yield found
    finally:
        for connection, process in found.items():
            connection.close()
            # A shard is whole or not there, so there is no better moment. Not SIGTERM: this process may have a handler for it.
            if process.pid is not None:
                process.kill()
                process.join()
        del os.environ["TOKENIZERS_PARALLELISM"]
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}


def _work(make: Callable[[Chunk], int], connection: Connection, others: list[Connection]) -> None:
    # Ctrl-C is for the process that waits for this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # With the first process's ends open in its forks, none of these would ever hear that it is gone.
    for other in others:
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = connection.recv()
            try:
                answer: Any = make(chunk)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)


def _answer(connection: Connection, process: Any) -> int:
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        process.join()
        raise _killed(process.exitcode) from None
    if isinstance(answer, BaseException):
        raise answer
    return int(answer)


def _killed(status: int) -> SftDistError:
    how = f"ended with exit status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed ({signal.Signals(-status).name})"
    error = SftDistError(
        f"a process that tokenises rows {how}"
        + (", as happens where the memory is used up" if status == -signal.SIGKILL else ""),
        hint="what is done is kept, and the next try goes on from there: with more memory (slurm.mem in a job), or on fewer\n"
        "  cores, each of which has a process: taskset -c 0-3 sft-dist data prepare ...",
    )
    if status == -signal.SIGKILL:
        error.kind = "out_of_memory"
    return error
