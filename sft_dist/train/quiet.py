"""Less noise from the libraries: their progress bars and notices that a user can do nothing about."""

from __future__ import annotations

import logging as builtin_logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence progress bars of loading and saving; warnings stay, but for those named here. Off with --debug."""
    if os.environ.get("SFT_DIST_DEBUG"):
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    # TRL 1.16 itself sets the old name, which transformers 5.17 still needs; can go with transformers 6.
    builtin_logging.getLogger("transformers.trainer").addFilter(_not_about_tied_heads)
    builtin_logging.getLogger("transformers.trainer_utils").addFilter(_not_about_micro_batches)
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional", category=FutureWarning)
    # transformers 5.23's name for it; torch 2.13's new one does not exist in 2.11.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # PEFT 0.21 asks by the old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # transformers of a setting that many BPE tokenizers carry and that it rightly leaves out.
    builtin_logging.getLogger("transformers.tokenization_utils_tokenizers").addFilter(
        lambda record: "Ignoring clean_up_tokenization_spaces" not in record.getMessage()
    )
    # DeepSpeed 0.19.8 about universal checkpoints of models without tensor parallelism, on each process.
    builtin_logging.getLogger("DeepSpeed").addFilter(lambda record: "MPU is not provided" not in record.getMessage())
    # On a CPU: its kernels would come from the Hub, and are not needed.
    builtin_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(builtin_logging.ERROR)
    # torch 2.13's own FSDP and DeepSpeed call them by the old names, several times a step.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)


def _not_about_tied_heads(record: builtin_logging.LogRecord) -> bool:
    """A tied head is stored once, under the embedding's name; on resume transformers reports it as missing."""
    return "missing keys in the checkpoint model loaded: ['lm_head.weight']" not in record.getMessage()


def _not_about_micro_batches(record: builtin_logging.LogRecord) -> bool:
    """On resume with another micro batch transformers warns of it; the global batch, and with it every step, is the same.

    Of a warning about more than that, the rest stays.
    """
    message = record.getMessage()
    if "do not match the ones in the `trainer_state.json`" not in message:
        return True
    head, *differences = message.split("\n")
    kept = [line for line in differences if not line.strip().startswith("per_device_train_batch_size:")]
    record.msg, record.args = "\n".join([head, *kept]), ()
    return bool(kept)
