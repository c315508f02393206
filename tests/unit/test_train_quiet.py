"""Which notices of the libraries are kept from the user."""

from __future__ import annotations

import logging

import pytest

from sft_dist.train.quiet import _not_about_micro_batches

HEAD = "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint directory: "
MICRO = "\n\tper_device_train_batch_size: 8 (from args) != 4 (from trainer_state.json)"
SAVE = "\n\tsave_steps: 10 (from args) != 20 (from trainer_state.json)"


@pytest.mark.parametrize(
    ("said", "left"),
    [(HEAD + MICRO, None), (HEAD + SAVE + MICRO, HEAD + SAVE), (HEAD + SAVE, HEAD + SAVE), ("other", "other")],
)
def test_another_micro_batch_on_resume_is_nothing_to_warn_of(said: str, left: str | None) -> None:
    record = logging.LogRecord("transformers.trainer_utils", logging.WARNING, "", 0, said, (), None)
    kept = _not_about_micro_batches(record)
    assert (record.getMessage() if kept else None) == left
