"""`python -m sft_dist.train.cut ...`: DeepSpeed's tool for universal copies, which ends with the process that started it."""

from __future__ import annotations

import os
import signal
import threading


def main() -> None:
    """Take the tool's arguments from the command line, and do what it does."""
    threading.Thread(target=_end_together, daemon=True).start()
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(ds_to_universal.parse_arguments())


def _end_together() -> None:
    """Wait until stdin is at its end, which is when whoever holds the other one is gone, however it went.

    The tool's own processes are of the same group. None of them would notice: each holds both ends of the queue that it
    waits for.
    """
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
