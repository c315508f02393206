"""Less noise from the libraries: their progress bars and notices that a user can do nothing about."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Silence progress bars of loading and saving; warnings stay, but for those named here. Off with --debug."""
    if os.environ.get("SFT_DIST_DEBUG"):
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    # TRL 1.16 itself sets the old name, which transformers 5.17 still needs; can go with transformers 6.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
