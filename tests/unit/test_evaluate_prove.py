"""The process that proves a model, and what is removed before one is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.rundir import RunDir

PROVING = """
import os, sys
from sft_dist.evaluate import prove
prove.prove = lambda folder: {"spins": os.environ.get("GOMP_SPINCOUNT"), "torch": "torch" in sys.modules}
sys.exit(prove.main(["."]))
"""


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}], ids=["by default", "as the user says"])
def test_threads_of_a_proof_spin_briefly_and_are_told_before_torch_comes_in(given: dict[str, str]) -> None:
    """Else two proofs on the same cores spin away each other's time."""
    inherited = {name: it for name, it in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", PROVING], env={**inherited, **given}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"spins": given.get("GOMP_SPINCOUNT", "1000"), "torch": False}


def test_what_killed_attempts_left_of_a_model_is_removed_and_nothing_else(tmp_path: Path) -> None:
    from sft_dist.train.publish import make_way

    run = RunDir(tmp_path)
    for name in ("model/adapter", ".model.k3j2/staged", ".model.x/staged/adapter", "model-refused", "checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_bytes(b"1")
    make_way(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model-refused"]
    make_way(run)
