"""GPUs by short name and by what nvidia-smi calls them."""

from __future__ import annotations

import pytest

from sft_dist.errors import ConfigError
from sft_dist.parallel.hardware import GPUS, gpu_model, gpu_named
from sft_dist.parallel.machine import Gpu


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        ("a100", "a100-80"),
        ("A100_40", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
    ],
)
def test_names(given: str, name: str) -> None:
    assert gpu_named(given).name == name


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"did you mean h100\?") as refused:
        gpu_named("h10")
    assert "a100-80" in (refused.value.hint or "")


def test_a_visible_gpu_has_the_memory_that_it_reports() -> None:
    found = gpu_model(Gpu("NVIDIA H100 80GB HBM3", 79.65, 9.0))
    assert (found.name, found.memory_gib, found.measured) == ("h100", 79.65, True)


@pytest.mark.parametrize(("capability", "bf16"), [(12.0, True), (7.0, False)])
def test_a_gpu_that_nobody_knows_is_taken_for_its_like(capability: float, bf16: bool) -> None:
    found = gpu_model(Gpu("NVIDIA Future 48GB", 47.5, capability))
    assert found.memory_gib == 47.5
    assert bool(found.bf16_tflops) is bf16
    assert "rates of" in found.name
    assert not found.measured


def test_the_numbers_are_plausible() -> None:
    for name, gpu in GPUS.items():
        assert 10 < gpu.usable_gib(1) < gpu.memory_gib, name
        assert gpu.usable_gib(8) < gpu.usable_gib(1), "NCCL takes some"
        assert 0.5 < gpu.gemm_share < 1, name
        assert gpu.network_bytes_per_s < gpu.inside_bytes_per_s, name
        assert 1e12 < gpu.peak_flops < 1e16, name
    assert GPUS["h200"].hbm_bytes_per_s == pytest.approx(4.3e12, rel=0.02), "measured"
    assert GPUS["h100"].inside_bytes_per_s == pytest.approx(370e9, rel=0.01)
