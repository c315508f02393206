"""DeepSpeed's shards for other processes or another ZeRO stage: a universal copy inside a checkpoint, made and removed.

DeepSpeed's own tool makes it: a folder that holds float32 weights and optimizer states parameter by parameter. The engine
loads it where its config says checkpoint.load_universal, by the name in the file `latest_universal`. What DeepSpeed
0.19.8 gets wrong on the way is mended here and in `mend`; docs/decisions.md (2026-11-22) has the evidence.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.errors import CheckpointError
from sft_dist.files import write_text

if TYPE_CHECKING:
    import torch

UNIVERSAL, PARTIAL, LATEST = "universal", "universal.partial", "latest_universal"
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def convert(checkpoint: Path, *, was: str, now: str, processes: int) -> None:
    """Add a universal copy to `checkpoint`, from DeepSpeed's shards of the plan `was`, for `processes` of the plan `now`.

    Raises CheckpointError if there is no room for it, if these processes cannot load it, or if DeepSpeed's tool fails;
    the checkpoint is then as it was.
    """
    shards = _shards(checkpoint)
    model = _model_states(shards)
    if now != "zero3":
        refuse_empty_parts([sum(map(math.prod, group.values())) for group in model["param_shapes"]], processes)
    _need_room(checkpoint, shards)
    partial = checkpoint / PARTIAL
    try:
        partial.mkdir()
        run_tool(checkpoint, shards.name)
        _restate(partial / UNIVERSAL, model, was, now)
        (partial / UNIVERSAL).rename(checkpoint / UNIVERSAL)
        write_text(checkpoint / LATEST, UNIVERSAL)
        shutil.rmtree(partial)
    except BaseException:
        discard(checkpoint)
        raise


def discard(checkpoint: Path) -> None:
    """Remove the universal copy from `checkpoint`, whole or half; no error if there is none."""
    (checkpoint / LATEST).unlink(missing_ok=True)
    for name in (UNIVERSAL, PARTIAL):
        shutil.rmtree(checkpoint / name, ignore_errors=True)


def mend(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Correct what a universal load leaves wrong in AdamW's groups and states; every process calls it after the load.

    Stage 3 gives all groups the settings of the first one, so that norms decay as well, and all states the same counter
    of steps, which then goes up once for each of them. On a GPU the counters stay on the host, which fused AdamW refuses.
    """
    import torch

    saved = torch.load(_optimizer_file(checkpoint / UNIVERSAL), weights_only=False)["param_groups"]
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].detach().to(parameter.device, copy=True)


def run_tool(checkpoint: Path, shards: str) -> None:
    """Let DeepSpeed's tool make PARTIAL/UNIVERSAL of the folder `shards`, both inside `checkpoint`.

    In a process of its own: it prints, and forks others, which a process with threads and a GPU must not. All of them end
    with this one. The paths are relative, because it takes them for regular expressions. Raises CheckpointError with its
    last line if it fails.
    """
    command = [
        # transformers' models carry no `universal_checkpoint_info`: all their parameters are plain ones.
        *(sys.executable, "-m", "sft_dist.train.cut", "--inject_missing_state"),
        *("--input_folder", shards, "--output_folder", f"{PARTIAL}/{UNIVERSAL}"),
    ]
    alone = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Into a file: a pipe has no end before the last of the tool's processes is gone, and they outlive a tool that is killed.
    with tempfile.TemporaryFile() as said:
        tool = subprocess.Popen(
            command,
            cwd=checkpoint,
            env={**os.environ, **alone},
            stdin=subprocess.PIPE,  # this process's end of it stays open for as long as it lives
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = tool.wait()
        except BaseException:  # a stop was asked for
            _end_all(tool)
            tool.wait()
            raise
        if status:
            _end_all(tool)
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").splitlines()
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise _failed(checkpoint, f"{last} (exit status {status})")


def _end_all(tool: subprocess.Popen[bytes]) -> None:
    """The tool and the processes that it started, if any of them is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(tool.pid, signal.SIGKILL)


def refuse_empty_parts(groups: list[int], processes: int) -> None:
    """CheckpointError if a process gets no part of a group of parameters; `groups` are the numbers in each.

    Stages 1 and 2 cut each group into equal parts of an even size, filled up at the end. Their universal load asks the
    first parameter of a part for its step, and raises IndexError where there is none (base_optimizer.py).
    """
    for numbers in groups:
        part = 2 * math.ceil(numbers / (2 * processes))
        if (processes - 1) * part >= numbers:
            raise CheckpointError(
                f"parameters of {numbers} numbers in all leave nothing for some of {processes} processes, "
                "and DeepSpeed cannot load that",
                hint="resume with fewer processes, or with as many as before",
            )


def _restate(universal: Path, model: dict[str, Any], was: str, now: str) -> None:
    """Write down anew what the stages keep differently, and of the rest only what is loaded.

    The tool leaves a whole shard of stage 3 among the settings, which every process would read.
    """
    import torch

    settings = torch.load(_optimizer_file(universal), weights_only=False, mmap=True)
    if was == "zero3":
        step = settings["optimizer_state_dict"]["state"][0]["step"]
    else:
        first = next(name for group in model["param_shapes"] for name in group)
        step = torch.load(universal / "zero" / first / "step.pt", weights_only=False)
    kept = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "param_groups")
    found = {name: settings[name] for name in kept if name in settings}
    found["ds_version"] = model["ds_version"]
    found["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": settings["param_groups"]}
    # Not into the file itself, which is mapped.
    torch.save(found, universal / "optimizer_state.pt")
    (universal / "optimizer_state.pt").replace(_optimizer_file(universal))
    if (was == "zero3") != (now == "zero3"):
        names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
        before, after = names if now == "zero3" else reversed(names)
        (universal / before).rename(universal / after)
    if was == "zero3" and now != "zero3":
        _shape(universal, model["param_shapes"], step)


def _shape(universal: Path, groups: list[dict[str, Any]], step: Any) -> None:
    """Give the states of stage 3, which are flat, their parameters' shapes and counters, as stages 1 and 2 want them."""
    import torch

    for group in groups:
        for name, shape in group.items():
            folder = universal / "zero" / name
            for state in STATES:
                flat = torch.load(folder / f"{state}.pt", weights_only=False)
                torch.save({"param": flat.view(shape), "cat_dim": 0}, folder / f"{state}.pt")
            torch.save(step, folder / "step.pt")


def _shards(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()


def _model_states(shards: Path) -> dict[str, Any]:
    """What DeepSpeed wrote beside the optimizer's shards, tensors on demand: stage 3 has a file of each process."""
    import torch

    path = min(shards.glob("*mp_rank_00_model_states.pt"))
    states: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return states


def _optimizer_file(universal: Path) -> Path:
    return universal / "zero" / "optimizer_state.pt"


def _need_room(checkpoint: Path, shards: Path) -> None:
    """CheckpointError if the tool would fill the disk: it has all states in a temporary folder when it writes them again,
    and one shard of stage 3 once more.
    """
    sizes = [path.stat().st_size for path in shards.iterdir()]
    needed, free = 2 * sum(sizes) + max(sizes), shutil.disk_usage(checkpoint).free
    if free < needed:
        gib = 2**30
        raise CheckpointError(
            f"{checkpoint.name} is in the shards of other processes, and cutting it anew takes {needed / gib:.3g} GiB "
            f"for a while; {checkpoint.parent} has {free / gib:.3g} GiB left",
            hint="make room there, or resume with as many processes and the plan of before",
        )


def _failed(checkpoint: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"DeepSpeed could not cut {checkpoint.name} anew: {why}",
        hint="resume with as many processes and the plan of before",
    )
