"""What is gathered from shares is what was trained: a tensor that is not is caught where no process holds it whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.files import read_json
from sft_dist.rundir import RunDir

TinyRun = Callable[..., RunDir]
Start = Callable[..., "object"]

TENSOR = "layers.1.mlp.down_proj."
# A training whose gathering brings one tensor as it was before the last steps: hardly anything that a few logits would tell.
HARMED = """
import sys
from sft_dist.train import publish, worker

function, tensor = sys.argv.pop(), sys.argv.pop()
real = getattr(publish, function)

def gather(*words):
    found = real(*words)
    return {name: it * (1 - 2**-7) if tensor in name and "lora_B" not in name else it for name, it in found.items()}

setattr(publish, function, gather)
from sft_dist.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("plan", "function", "overrides"),
    [
        ("zero3", "whole_weights", ("model.dtype=bfloat16",)),
        ("fsdp2", "whole_weights", ("model.dtype=bfloat16",)),
        ("zero3", "adapter_weights", ("model.lora={r: 4}",)),
    ],
)
def test_a_tensor_of_an_earlier_step_is_caught(
    tmp_path: Path, tiny_run: TinyRun, start: Start, plan: str, function: str, overrides: tuple[str, ...]
) -> None:
    run = tiny_run(
        tmp_path, "harmed", f"parallel.plan={plan}", "parallel.num_processes=2", "train.max_steps=1",
        "checkpoint.verify_export=files", *overrides,
    )  # fmt: skip
    script = tmp_path / "harmed.py"
    script.write_text(HARMED, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(*launcher, script, run.path, TENSOR, function)
    _, said = process.communicate(timeout=180)  # type: ignore[attr-defined]
    assert not run.model.exists(), said[-4000:]
    reason = read_json(run.status)["reason"]
    assert "gathering it lost what was trained" in reason, said[-4000:]
    assert TENSOR in reason
