"""What the planner says of a run, beside what the run then takes: plan/predicted.json and plan/measured.json."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.files import read_json, write_json
from sft_dist.parallel.hardware import gpu_model
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.predicted import compare, predicted
from sft_dist.parallel.resolve import Resolved
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import MANIFEST

log = logging.getLogger(__name__)
# Steps that are not counted: the first ones compile, make the optimizer's states and find their memory.
WARM_UP = 5


def write_forecast(
    run: RunDir, config: Config, resolved: Resolved, machine: Machine, ledger: Mapping[str, Any]
) -> float | None:
    """Write plan/predicted.json; MFU for each token/s and GPU, None without a GPU or for a model that cannot be counted.

    MFU is the share of the GPU's bfloat16 peak that goes into the model's own operations: 6 for each weight of a matrix
    product and token, 6 x heads x head_dim x length for causal attention; recomputing does not count.
    """
    if resolved.use_cpu:
        return None
    mean = ledger["tokens"] / max(1, ledger["rows"])
    try:
        forecast = predicted(
            config,
            resolved.layout,
            gpu_model(machine.gpus[0]),
            resolved.per_device_train_batch_size,
            longest=int(ledger["longest_row"]),
            mean=mean,
            trained=ledger["trained_tokens"] / max(1, ledger["tokens"]),
            spread=float(ledger.get("spread", 0.0)),
            count=int(ledger["rows"]),
        )
    except (PreflightError, ConfigError) as error:
        log.info("the planner says nothing of this run: %s", error.message)
        return None
    write_json(run.predicted, forecast)
    speed = forecast["tokens_per_s_per_gpu"]
    return float(forecast["mfu"] / speed) if speed else None


def write_measurements(
    run: RunDir,
    *,
    peak_memory_gib: float,
    step_seconds: Sequence[float],
    tokens: int,
    processes: int,
    mfu_per_speed: float | None,
) -> None:
    """Write plan/measured.json and log how far the forecast was off, where there is one.

    `step_seconds` are those of this attempt's steps, `tokens` what all `processes` trained in them together.
    """
    forecast = read_json(run.predicted)
    counted = step_seconds[WARM_UP:]
    if forecast is None or not counted:
        return
    seconds = statistics.median(counted)
    speed = tokens / len(step_seconds) / seconds / processes
    measured: dict[str, Any] = {
        "peak_memory_gib": round(peak_memory_gib, 3),
        "seconds_per_step": round(seconds, 5),
        "tokens_per_s_per_gpu": round(speed),
        "mfu": round(speed * mfu_per_speed, 4) if mfu_per_speed else None,
        "checkpoint_gib": _checkpoint_gib(run),
    }
    write_json(run.measured, measured)
    for row in compare(forecast, measured):
        unit = f" {row['unit']}" if row["unit"] else ""
        log.info(
            "%s: predicted %s%s, measured %s%s (%+.0f %%)",
            row["what"], row["predicted"], unit, row["measured"], unit, 100 * row["off"],
        )  # fmt: skip


def _checkpoint_gib(run: RunDir) -> float | None:
    for _, folder in list_checkpoints(run):
        manifest = read_json(folder / MANIFEST)
        if manifest is not None:
            return round(float(sum(entry["bytes"] for entry in manifest["files"].values())) / 2**30, 3)
    return None
