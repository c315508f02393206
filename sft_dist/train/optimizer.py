"""AdamW that keeps float32 master weights and states for bfloat16 parameters.

bfloat16 has 8 bits of mantissa: an update below 1/256 of a weight would be lost, so the updates are made on float32
copies and the parameters are the rounded copies. Costs 12 bytes a parameter beside the 2 of the parameter. Parameters
that are float32 already (adapters) are their own masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

# Elements updated at a time: the float32 copies of their gradients are all that a step needs beside the states (256 MiB).
BATCH = 64 * 2**20


class MasterWeightAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) in torch's fused implementation, on float32 copies of the parameters."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the parameters' gradients; `closure` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                self._state_of(param)
            for batch in _batches(params):
                self._update(group, batch)
            with_master = [param for param in params if "master" in self.state[param]]
            if with_master:
                torch._foreach_copy_(with_master, [self.state[param]["master"] for param in with_master])
        return loss

    def _update(self, group: dict[str, Any], pieces: list[Piece]) -> None:
        """One update of the pieces' masters: AdamW in one kernel, from float32 copies of their gradients."""
        states = [self.state[piece.param] for piece in pieces]
        adamw(
            [piece.of(state.get("master", piece.param)) for piece, state in zip(pieces, states, strict=True)],
            [piece.of(piece.param.grad).float() for piece in pieces],
            [piece.of(state["exp_avg"]) for piece, state in zip(pieces, states, strict=True)],
            [piece.of(state["exp_avg_sq"]) for piece, state in zip(pieces, states, strict=True)],
            [],
            # The kernel counts the step up for every piece; only the last one of a parameter may count for it.
            [
                state["step"] if piece.last else state["step"].clone()
                for piece, state in zip(pieces, states, strict=True)
            ],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the states stay float32: torch would cast them to the parameters' bfloat16."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    self.state[param][name] = value.to(param.device, copy=True)

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            if param.dtype != torch.float32:
                state["master"] = param.detach().to(torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter's elements."""

    param: torch.Tensor
    start: int
    end: int

    @property
    def last(self) -> bool:
        return self.end == self.param.numel()

    def of(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """The same stretch of another tensor of the parameter's shape, as a view."""
        assert tensor is not None
        if self.start == 0 and self.last:
            return tensor
        return tensor.view(-1)[self.start : self.end]


def _batches(params: list[torch.Tensor]) -> Iterator[list[Piece]]:
    """The parameters' elements in order, at most BATCH at a time; a parameter that is not contiguous is not cut."""
    batch: list[Piece] = []
    room = BATCH
    for param in params:
        total, start = param.numel(), 0
        whole = not param.is_contiguous() or param.grad is None or not param.grad.is_contiguous()
        while start < total:
            end = total if whole else min(total, start + room)
            batch.append(Piece(param, start, end))
            room -= end - start
            start = end
            if room <= 0:
                yield batch
                batch, room = [], BATCH
    if batch:
        yield batch
