"""Whether a model folder holds what was trained: `python -m sft_dist.evaluate.prove FOLDER`.

PROOF.json says what was trained: type, shape and hash of each tensor, how the tokenizer cuts some texts, and what the
trained model predicts for a few rows. The process is a fresh one, so that nothing is compared with itself. The files are
read without torch; the model is loaded once, on the CPU, and only where the proof has predictions.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_dist.errors import CheckpointError, SftDistError, exit_status
from sft_dist.evaluate.against_base import Base, base_tensors, shape_problems, zero_problems
from sft_dist.evaluate.tensor_files import Tensor, read_tensors, strays
from sft_dist.export import ADAPTER, PROOF, file_hash
from sft_dist.files import read_json, told_by, utc_now
from sft_dist.logs import log_to_stderr
from sft_dist.process import begin
from sft_dist.rundir import RunDir
from sft_dist.train.cpu import settle_cpu

SHOWN = 5


def prove(folder: Path) -> dict[str, Any]:
    """What was found of the model in `folder`, which is what PROOF.json says. Raises CheckpointError that names what is not."""
    proof = read_json(folder / PROOF)
    if not isinstance(proof, dict) or proof.get("format") != 1:
        raise CheckpointError(
            f"{folder} has no {PROOF}, so nothing says what it should hold",
            hint="models that an older version of sft-dist published have none",
        )
    base = base_tensors(proof)
    found: dict[str, Any] = {
        "checked": utc_now(),
        "tensor_count": sum(len(part) for part in proof["tensors"].values()),
        "zeros": [],
    }
    problems = [*_file_problems(folder, proof)]
    for part in proof["tensors"]:
        problems += _tensor_problems(folder, part, proof, base, found["zeros"])
    if not problems and proof["level"] == "full":  # else there is nothing that could be loaded
        from sft_dist.evaluate.merged import merge_problems
        from sft_dist.evaluate.reloaded import reloaded, tokenizer_problems

        problems += tokenizer_problems(folder, proof)
        if len(proof["tensors"]) == 2:
            problems += merge_problems(folder, folder / ADAPTER, base, found)
        if not problems:
            found |= reloaded(folder, proof, problems)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"it is not what was trained: {'; '.join(problems[:SHOWN])}{more}")
    return found


def _file_problems(folder: Path, proof: dict[str, Any]) -> Iterator[str]:
    """Config, tokenizer and template: files that are missing or others than were written."""
    for name, digest in proof["files"].items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif file_hash(folder / name) != digest:
            yield f"{name} is not what was written"


def _tensor_problems(folder: Path, part: str, proof: dict[str, Any], base: Base, zeros: list[str]) -> Iterator[str]:
    """What is wrong with the files of the `model` or of its `adapter`; adds to `zeros` the tensors that rightly are."""
    where = folder / ADAPTER if part == "adapter" else folder
    wanted: dict[str, dict[str, Any]] = proof["tensors"][part]
    index = read_json(where / "model.safetensors.index.json") or {"weight_map": {}}
    absent = sorted({name for name in index["weight_map"].values() if not (where / name).is_file()})
    yield from (f"{name} is missing" for name in absent)
    if not absent and not list(where.glob("*.safetensors")):
        yield f"there are no weights in {where.name}"
        return
    whole = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
    yield from (
        f"{name} does not belong to it, and readers may take it for its weights" for name in strays(where, whole)
    )
    try:
        there = read_tensors(where)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    for name, facts in wanted.items():
        tensor = there.get(name)
        if tensor is not None:
            yield from _differences(tensor, facts)
        elif not any(name in pair and there.keys() & set(pair) for pair in _pairs(wanted)):
            yield f"{name} is missing"
    yield from (f"{name} was not trained" for name in there if name not in wanted)
    if absent:
        return
    lost = [*zero_problems(there, proof, base)]
    yield from lost
    if not lost:
        zeros += [name for name, tensor in there.items() if tensor.zero]
    if part == "model":
        yield from shape_problems(there, proof, base)


def _pairs(wanted: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Names of tensors that share their memory: it is enough to store one of them."""
    groups: dict[str, list[str]] = {}
    for name, facts in wanted.items():
        if "same_as" in facts:
            groups.setdefault(facts["same_as"], [facts["same_as"]]).append(name)
    return [tuple(group) for group in groups.values()]


def _differences(tensor: Tensor, facts: dict[str, Any]) -> Iterator[str]:
    if not math.prod(tensor.shape):
        yield f"{tensor.name} is empty"
    if not tensor.finite:
        yield f"{tensor.name} holds values that are not finite"
    if (tensor.dtype, list(tensor.shape)) != (facts["dtype"], facts["shape"]):
        yield f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, trained was {facts['dtype']} {facts['shape']}"
    elif tensor.hash != facts["hash"]:
        yield f"{tensor.name} has other values than were trained"


def verdict(run: RunDir) -> dict[str, Any] | None:
    """What a fresh process says of a run's published model, `problem` being what is wrong with it; None if it has none."""
    if not (run.model / "DONE").is_file():
        return None
    if not (run.model / PROOF).is_file():
        return {"problem": None, "unproven": f"it has no {PROOF}: an older version of sft-dist published it"}
    return proven(run.model)


def proven(folder: Path) -> dict[str, Any]:
    """What a fresh process says of the model in `folder`; `problem` is what is wrong with it, None if nothing is."""
    command = [sys.executable, "-m", "sft_dist.evaluate.prove", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    told = told_by(done.stdout)
    if done.returncode == 0 and "checked" in told:
        return {"problem": None, **told}
    return {"problem": told.get("message") or f"the process that read it ended with status {done.returncode}"}


def main(arguments: list[str]) -> int:
    """Print what was found, or what is wrong, as one line of JSON; the exit status is that of the error."""
    log_to_stderr()
    settle_cpu()  # before torch comes in; another run on this machine may be proven, too
    try:
        found = prove(Path(arguments[0]))
    except (SftDistError, OSError) as error:
        told = {"message": getattr(error, "message", str(error)), "hint": getattr(error, "hint", None)}
        sys.stdout.write(json.dumps(told) + "\n")
        return exit_status(error)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1:]))
