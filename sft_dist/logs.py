"""Where our own log lines go."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Plain lines on stderr from this package only: the libraries have handlers of their own."""
    logger = logging.getLogger("sft_dist")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
