"""A job in an image through a real SLURM; apptainer and pyxis are stand-ins, which start the inner command as those do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from tests.container_fakes import container_env, make_image
from tests.slurm.test_submit import ENV, PATIENCE, PLAIN, TWO_BY_TWO, decisions, past_step

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.slurm.conftest import Lab

pytestmark = pytest.mark.slurm
pytest.importorskip("submitit")


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_job_in_an_image_hears_signals_and_is_requeued_from_outside(
    lab: Lab, run_cli: RunCli, tmp_path: Path, runtime: str
) -> None:
    """The image's PATH has no scontrol: who requeues is the batch script."""
    image = make_image(tmp_path / "image")
    tools = container_env(tmp_path, "apptainer", "srun")
    if runtime == "apptainer":
        (tmp_path / "tools" / "srun").unlink()
    words = ("smoke", *TWO_BY_TWO, *PLAIN, "run.name=inside", "train.max_steps=300")
    container = (f"container.runtime={runtime}", f"container.image={image}", "container.env={INNER: 'a b'}")
    done = run_cli("submit", *words, *container, env={**ENV, **tools})
    assert done.returncode == 0, done.stderr
    run, job = RunDir(tmp_path / "runs" / "inside"), done.stdout.split()[-2]
    lab.eventually(past_step(run, 3), PATIENCE, job)
    lab.run("scancel", "--signal=USR2", job)
    lab.hurry(job)
    lab.wait_for(job, patience=PATIENCE)
    assert decisions(run) == ["requeue 1 of 10: time limit", "done"]
    rows = read_jsonl(run.attempts)
    assert rows[1]["first_step"] == rows[0]["last_step"]
    assert run.read_status()["state"] == "done"
    calls = (tmp_path / ("calls" if runtime == "apptainer" else "calls.srun")).read_bytes().decode()
    # Two starts of two nodes, or of one srun each; and what submit asked before.
    assert calls.count("submitit.core._submit") == (4 if runtime == "apptainer" else 2)
