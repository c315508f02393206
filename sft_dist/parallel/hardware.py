"""GPUs by name: memory, arithmetic and links, as data sheets give them, and what share of it is reached.

Measured here: H100 SXM and H200 (matrix products and copies, torch 2.11, November 2026). Every other share is assumed
to be as good, which is said where it is used (`measured`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from sft_dist.errors import ConfigError
from sft_dist.parallel.machine import Gpu

# What is not there for tensors although nvidia-smi counts it as the card's. A CUDA context with the kernels of torch
# takes 0.5 to 0.6 GiB; NCCL's channels, rings and proxies another 0.5 to 1 GiB once there is more than one process.
CONTEXT_GIB = 0.6
NCCL_GIB = 1.0
# Bytes a second that arrive of what the data sheet says. Copies: 3.0 of 3.35 TB/s on an H100, 4.3 of 4.8 on an H200.
HBM_SHARE = 0.9
# NCCL on NVLink: 370 of 450 GB/s each way with NVLink multicast off (783 GB/s both ways are reported in nccl#1264).
NVLINK_SHARE = 0.82
PCIE_SHARE = 0.75
NETWORK_SHARE = 0.8


@dataclass(frozen=True)
class GpuModel:
    """One kind of GPU in the node that it usually stands in. Rates are those of the data sheet, without sparsity."""

    name: str
    memory_gib: float
    """All of it, as nvidia-smi reports it."""
    bf16_tflops: float
    """Dense bfloat16 products with float32 sums; 0 where the hardware has none."""
    fp32_tflops: float
    gemm_share: float
    """What large matrix products reach of it."""
    hbm_tbps: float
    nvlink_gbps: float
    """Each way, to all other GPUs of the node; 0 is no NVLink."""
    pcie_gbps: float
    """Each way."""
    network_gbps: float
    """Each way and GPU, between nodes. An assumption about the cluster, not a property of the GPU."""
    measured: bool = False

    @property
    def peak_flops(self) -> float:
        """Floating-point operations a second in the type that the planner takes for this GPU."""
        return (self.bf16_tflops or self.fp32_tflops) * 1e12

    def usable_gib(self, world_size: int) -> float:
        """GiB for tensors in each of so many processes."""
        return self.memory_gib - CONTEXT_GIB - (NCCL_GIB if world_size > 1 else 0.0)

    @property
    def hbm_bytes_per_s(self) -> float:
        return self.hbm_tbps * 1e12 * HBM_SHARE

    @property
    def inside_bytes_per_s(self) -> float:
        """Between two GPUs of a node, each way."""
        if self.nvlink_gbps:
            return self.nvlink_gbps * 1e9 * NVLINK_SHARE
        return self.pcie_bytes_per_s

    @property
    def pcie_bytes_per_s(self) -> float:
        return self.pcie_gbps * 1e9 * PCIE_SHARE

    @property
    def network_bytes_per_s(self) -> float:
        return self.network_gbps * 1e9 * NETWORK_SHARE


# Network: 400 Gb/s a GPU beside H100 and newer (InfiniBand NDR, one card a GPU), 200 beside A100, 100 beside V100; for
# cards on PCIe 100 Gb/s a node, shared by four.
_H, _A, _V, _SHARED = 50.0, 25.0, 12.5, 3.1
# name: (memory GiB, bf16, fp32, share, HBM TB/s, NVLink, PCIe, network)
_ROWS: Mapping[str, tuple[float, float, float, float, float, float, float, float]] = {
    "b200": (179.1, 2250, 75, 0.70, 8.0, 900, 64, _H),
    "h200": (140.4, 989, 67, 0.79, 4.8, 450, 64, _H),
    "gh200": (95.6, 989, 67, 0.77, 4.0, 0, 64, _H),
    "h100": (79.6, 989, 67, 0.77, 3.35, 450, 64, _H),
    "h100-nvl": (93.6, 835, 60, 0.77, 3.9, 300, 64, _A),
    "h100-pcie": (79.6, 756, 51, 0.70, 2.0, 0, 64, _A),
    "a100-80": (80.0, 312, 19.5, 0.80, 2.04, 300, 32, _A),
    "a100-40": (40.0, 312, 19.5, 0.80, 1.56, 300, 32, _A),
    "l40s": (45.0, 362, 91, 0.60, 0.86, 0, 32, _SHARED),
    "l4": (22.5, 121, 30, 0.60, 0.30, 0, 32, _SHARED),
    "a10g": (22.5, 70, 35, 0.75, 0.60, 0, 32, _SHARED),
    "rtx4090": (24.0, 165, 82, 0.85, 1.01, 0, 32, _SHARED),
    "rtx3090": (24.0, 71, 35, 0.85, 0.94, 0, 32, _SHARED),
    "v100": (32.0, 0, 15.7, 0.85, 0.90, 150, 16, _V),
    "v100-16": (16.0, 0, 15.7, 0.85, 0.90, 150, 16, _V),
    "t4": (15.0, 0, 8.1, 0.80, 0.32, 0, 16, _SHARED),
}
GPUS = {name: GpuModel(name, *row, measured=name in ("h100", "h200")) for name, row in _ROWS.items()}
ALIASES = {"a100": "a100-80", "h100-sxm": "h100", "h100-80": "h100", "4090": "rtx4090", "3090": "rtx3090"}
# What nvidia-smi calls them: words that all stand in the name. The first row that fits counts.
_SMI: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gh200", ("gh200",)),
    ("b200", ("b200",)),
    ("h200", ("h200",)),
    ("h100-nvl", ("h100", "nvl")),
    ("h100-pcie", ("h100", "pcie")),
    ("h100", ("h100",)),
    ("a100-40", ("a100", "40gb")),
    ("a100-80", ("a100",)),
    ("l40s", ("l40s",)),
    ("l4", ("l4",)),
    ("a10g", ("a10g",)),
    ("rtx4090", ("4090",)),
    ("rtx3090", ("3090",)),
    ("v100-16", ("v100", "16gb")),
    ("v100", ("v100",)),
    ("t4", ("t4",)),
)


def gpu_named(name: str) -> GpuModel:
    """The GPU with this short name, or the name that nvidia-smi gives it; ConfigError with the nearest if unknown."""
    short = name.strip().lower().replace("_", "-").replace(" ", "-")
    short = ALIASES.get(short, short)
    if short in GPUS:
        return GPUS[short]
    found = _from_smi(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(short, [*GPUS, *ALIASES], n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"the planner knows no GPU {name!r}{guess}", hint=f"GPUs: {', '.join(GPUS)}")


def gpu_model(gpu: Gpu) -> GpuModel:
    """The kind of a visible GPU, with the memory that it reports.

    One that the table does not name is taken for the nearest by memory, which is the part that decides what fits.
    """
    found = _from_smi(gpu.name)
    if found is None:
        ample = [kind for kind in GPUS.values() if bool(kind.bf16_tflops) == (gpu.compute_capability >= 8.0)]
        nearest = min(ample, key=lambda kind: abs(kind.memory_gib - gpu.memory_gib))
        found = dataclasses.replace(nearest, name=f"{gpu.name} (rates of {nearest.name})", measured=False)
    return dataclasses.replace(found, memory_gib=gpu.memory_gib) if gpu.memory_gib else found


def _from_smi(name: str) -> GpuModel | None:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    for short, needed in _SMI:
        if all(word in words for word in needed):
            return GPUS[short]
    return None
