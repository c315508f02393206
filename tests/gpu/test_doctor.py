"""`doctor` on GPUs: each computes what the CPU does, and over NCCL they add numbers up."""

from __future__ import annotations

import pytest
import torch

from sft_dist.check.gpus import look_at_gpus
from sft_dist.check.processes import look_at_processes
from sft_dist.parallel.machine import this_machine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_healthy_gpus_are_found_healthy() -> None:
    machine = this_machine()
    found = list(look_at_gpus(machine))
    assert [it.level for it in found] == ["ok"] * len(machine.gpus), found
    assert all("TFLOP/s in bfloat16" in it.said for it in found)
    met = look_at_processes(machine)
    assert met.level == "ok", met
    assert ("nccl" if len(machine.gpus) > 1 else "gloo") in met.said
