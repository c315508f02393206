"""A model with its adapter merged in, worked out once more: base + scale * B A, tensor by tensor, and no forward pass.

The base model's files and the published adapter's are read anew, so that an adapter that was lost on the way, on one layer or
on all, shows as what it is; logits of a short training might hardly move.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.evaluate.against_base import IN_ADAPTER, Base, adapter_settings
from sft_dist.evaluate.tensor_files import headers

if TYPE_CHECKING:
    import torch

ROWS = ".token_adapter.trainable_tokens_delta"
# Sums in another order: a share of the largest change of the tensor.
SLACK = 1e-4
# How far from all of it the share of a tensor's change may be that the merged one holds, beside what chance explains: so many
# standard deviations of what rounding at random may add or take.
SHARE, DEVIATIONS = 0.02, 6.0


class Adapter:
    """The tensors of an adapter's file by the names of what they change; opened, not read."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.settings = adapter_settings(folder)
        self.file = safe_open(folder / "adapter_model.safetensors", "pt")
        names = [name for name in headers(folder) if name.startswith(IN_ADAPTER)]
        self.names = {name.removeprefix(IN_ADAPTER): name for name in names}

    def changes(self, name: str) -> bool:
        """Whether the tensor `name` of the base is another one once the adapter is merged."""
        module = name.removesuffix(".weight")
        return name in self.names or any(f"{module}{part}" in self.names for part in (".lora_A.weight", ROWS))

    def joins(self, name: str, base: Base) -> bool:
        """Whether the change of `name` is one of several tensors at once, as of experts, or has a rank of its own."""
        modules = {it.partition(".lora_A.")[0].replace(".base_layer", "") for it in self.names if ".lora_A." in it}
        joined = tuple(f"{module}." for module in modules if f"{module}.weight" not in base)
        patterns = (self.settings.get("rank_pattern") or {}) | (self.settings.get("alpha_pattern") or {})
        module = name.removesuffix(".weight")
        return name.startswith(joined) or any(re.fullmatch(rf"(.*\.)?({it})", module) for it in patterns)

    def read(self, name: str) -> torch.Tensor:
        return _tensor(self.file, self.names[name])

    def apply(self, name: str, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What should stand in the place of `base`, in float32, and by how much it was changed."""
        import torch

        module = name.removesuffix(".weight")
        if name in self.names:
            return self.read(name).float(), torch.zeros(1)
        wanted, change = base.float(), torch.zeros(1)
        if f"{module}.lora_A.weight" in self.names:
            down, up = (self.read(f"{module}.lora_{it}.weight").float() for it in "AB")
            change = (up @ down) * self._scale()
            if change.shape != base.shape or self.settings.get("fan_in_fan_out"):
                change = change.T  # layers that hold their matrices the other way round
            wanted = wanted + change
        if f"{module}{ROWS}" in self.names:
            rows = self._rows(module)
            wanted[rows] = self.read(f"{module}{ROWS}").float()
        return wanted, change

    def _scale(self) -> float:
        rank, alpha = float(self.settings["r"]), float(self.settings["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _rows(self, module: str) -> list[int]:
        """Token ids whose rows of `module` were trained."""
        told = self.settings["trainable_token_indices"]
        return list(told[next(name for name in told if module.endswith(name))] if isinstance(told, dict) else told)


def _tensor(file: Any, name: str) -> torch.Tensor:
    whole: torch.Tensor = file.get_tensor(name)
    return whole


def merge_problems(folder: Path, adapter_folder: Path, base: Base, told: dict[str, Any]) -> Iterator[str]:
    """Tensors of the merged model in `folder` that are not what base and adapter give, up to rounding.

    Notes in `told` how many were compared, and the least share of a tensor's change that the merged one holds.

    Tensors that the base's files have under other names are not compared, nor experts, which PEFT changes together.
    """
    from safetensors import safe_open

    adapter = Adapter(adapter_folder)
    compared, found, shares = 0, headers(folder), [1.0]
    for name, (_, _, file) in found.items():
        if name not in base or adapter.joins(name, base):
            continue
        with safe_open(file, "pt") as mine, safe_open(base[name][2], "pt") as theirs:
            problem = _difference(name, _tensor(mine, name), _tensor(theirs, name), adapter, shares)
        compared += 1
        if problem:
            yield problem
    told |= {"merged_compared": compared, "merged_share": round(min(shares), 4)}


def _difference(
    name: str, merged: torch.Tensor, base: torch.Tensor, adapter: Adapter, shares: list[float]
) -> str | None:
    """What is wrong with one tensor; a row that only fills a grown vocabulary up, or starts a new token, has no base.

    Adds to `shares` how much of the adapter's change the merged tensor holds. Most changes are smaller than a step of
    bfloat16: each value may be right by itself, and all of them together have lost the adapter.
    """
    import torch

    if not merged.dim() or merged.shape[1:] != base.shape[1:] or len(merged) < len(base):
        return None  # said of its shape
    if not merged.is_floating_point() or not adapter.changes(name):
        same = torch.equal(merged[: len(base)], base.to(merged.dtype))
        return None if same else f"{name} is not what it is in the base model, and the adapter does not change it"
    start = merged.clone()
    start[: len(base)] = base.to(merged.dtype)
    wanted, change = adapter.apply(name, start)
    step = torch.finfo(merged.dtype).eps * wanted.abs()
    # PEFT rounds the change of a bare parameter, a router, before it is added.
    room = step + torch.finfo(merged.dtype).eps * change.abs()
    room += max(SLACK * float(change.abs().max()), torch.finfo(merged.dtype).tiny)
    off = int(((merged.float() - wanted).abs() > room).sum())
    if off:
        return f"{name} is not the base model's with the adapter merged into it ({off:,} values)"
    whole = float(change.square().sum(dtype=torch.float64))
    if change.shape != merged.shape or not whole or not torch.isfinite(change).all():
        return None
    share = float(((merged.float() - start.float()) * change).sum(dtype=torch.float64)) / whole
    shares.append(share)
    # A value that is rounded up or down by chance deviates by half a step at most.
    chance = DEVIATIONS * math.sqrt(float((change * step / 2).square().sum(dtype=torch.float64))) / whole
    if abs(share - 1) <= SHARE + chance:
        return None
    return f"{name} is not the base model's with the adapter merged into it: it holds {share:.0%} of the change"
