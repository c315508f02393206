"""Cross-entropy of the trained tokens, its gradient computed in the same pass over the logits.

TRL's head computes the logits twice (once for the loss, once for the gradient) and, where there is no Triton, does so
for every position, trained or not. Here only the trained positions meet the head, once: three matrix products instead
of four. The gradient with respect to the logits is softmax(z) - onehot(target), divided by the number of tokens. Where
rows give tokens weights, each counts by its weight, and the loss is divided by their sum.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

# Logits of so many tokens exist at a time. On a CPU they should stay near the caches; a GPU wants long products.
CPU_CHUNK = 256
GPU_CHUNK = 2048
# What a batch holds for the trainer only.
NOT_FOR_THE_MODEL = ("labels", "shift_labels", "filling", "weights")
# Settings of a model config that change its logits; TRL's own head knows them, this one leaves such models to it.
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)


def supports(model: PreTrainedModel) -> bool:
    """Whether the model's logits are a plain linear map of its last hidden state."""
    head = model.get_output_embeddings()
    # PEFT wraps a head that it trains, as a whole or for new tokens; the wrapper's `weight` is the one in use.
    head = getattr(head, "original_module", head)
    config = model.config.get_text_config()
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and not any(getattr(config, name, None) for name in LOGIT_SETTINGS)
    )


def install(model: PreTrainedModel) -> None:
    """Give `model` a forward pass that computes the loss where it is called with `trained_token_loss=True`.

    The loss has to be computed inside of the forward pass, and the head's weight used inside of the head's: DDP, ZeRO-3
    and FSDP2 gather parameters and watch for gradients there. Without the keyword both forward passes are as before.
    """
    original, head = model.forward, model.get_output_embeddings()
    original_head = head.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against this signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        trained_token_loss: bool = False,
        positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        num_items: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not trained_token_loss:
            return original(*args, **kwargs)
        assert positions is not None and targets is not None
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state.flatten(0, 1)
        divisor = torch.full_like(targets[:1].sum(), targets.numel()) if num_items is None else num_items
        divisor = divisor.to(hidden.device).clamp(min=1)
        chosen = hidden.index_select(0, positions)
        loss, correct = self.get_output_embeddings()(chosen, targets=targets, divisor=divisor, shares=shares)
        return {"loss": loss, "correct": correct}

    def head_forward(
        self: torch.nn.Linear,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        divisor: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
    ) -> Any:
        if targets is None:
            return original_head(hidden)
        parts = None if shares is None else from_bits(shares)
        return _HeadLoss.apply(hidden, self.weight, targets, divisor, parts)  # type: ignore[no-untyped-call]

    model.forward = types.MethodType(forward, model)
    head.forward = types.MethodType(head_forward, head)


def trained_token_loss(
    model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """The loss of a batch summed over its trained tokens and divided by `num_items` (their own `amount` if None).

    Where the batch has weights, each token's loss is multiplied by its own. `model` is one that `install` changed, in
    whatever wrapper the plan put around it. Returns the loss (float32 scalar), the number of trained tokens, and how many of
    them the model predicts (scalar on the device).
    """
    if "targets" not in inputs:
        inputs = with_targets(inputs)
    # transformers divides the count, which makes it a float; FSDP2 would cast that to bfloat16, and 301 is 300 there.
    rest = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
    if "weights" in inputs:
        whole = amount(inputs) if num_items is None else torch.as_tensor(num_items)
        shares = from_bits(inputs["weights"]).double() / torch.where(whole > 0, whole, 1)
        rest["shares"], num_items = as_bits(shares.float()), 1
    total = None if num_items is None else torch.as_tensor(num_items).round().to(torch.int64)
    output = model(**rest, num_items=total, trained_token_loss=True)
    return output["loss"], inputs["targets"].numel(), output["correct"]


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with the trained tokens (`targets`) and where the model must predict each of them (`positions`).

    Both are [N], int64; a position counts over the flattened rows and stands one before its target. Done while a batch is
    put together on the CPU, since a GPU would have to be waited for to learn how many they are. A part of rows that are
    cut between processes comes with `shift_labels`, which stand where they are to be predicted already. So do `weights`,
    of which those of the trained tokens are left.
    """
    labels = _labels_ahead(batch)
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    positions = rows * batch["input_ids"].shape[1] + columns
    weights = {"weights": batch["weights"][rows, columns]} if "weights" in batch else {}
    return {**batch, **weights, "positions": positions, "targets": labels[rows, columns]}


def amount(batch: dict[str, Any]) -> torch.Tensor:
    """What the loss of a batch is a mean over: the number of its trained tokens, or the sum of their weights (float64)."""
    if "weights" not in batch:
        return torch.tensor(batch["targets"].numel()) if "targets" in batch else (_labels_ahead(batch) != -100).sum()
    chosen = batch if "targets" in batch else with_targets(batch)
    return from_bits(chosen["weights"]).sum(dtype=torch.float64)


def as_bits(numbers: torch.Tensor) -> torch.Tensor:
    """float32 as int32 of the same bits: what stands beside a batch as floats, DeepSpeed and FSDP2 round to bfloat16."""
    return numbers.view(torch.int32)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that `as_bits` was given."""
    return bits.view(torch.float32)


def _labels_ahead(batch: dict[str, Any]) -> torch.Tensor:
    """The labels where they are to be predicted, one before their token."""
    labels: torch.Tensor = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return labels


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        divisor: torch.Tensor,
        shares: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, H], weight [V, H], targets [N], divisor scalar -> loss, number of correct predictions.

        `shares` [N], float32: how much each target counts, if not once.
        """
        device = hidden.device
        loss = torch.zeros((), dtype=torch.float32, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        # Evaluation under no_grad needs no gradient, and an adapter's training none of the head; needs_input_grad says so.
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden or wants_weight else None
        grad_weight: torch.Tensor | None = None
        size = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        one_chunk = hidden.shape[0] <= size
        for start in range(0, hidden.shape[0], size):
            rows, wanted = hidden[start : start + size], targets[start : start + size, None]
            logits = rows @ weight.t()
            correct += (logits.argmax(-1, keepdim=True) == wanted).sum()
            log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            share = None if shares is None else shares[start : start + size, None]
            said = log_probs.gather(1, wanted)
            loss -= (said if share is None else said * share).sum()
            if grad_hidden is None:
                continue
            grad = log_probs.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
            grad = (grad.div_(divisor) if share is None else grad.mul_(share)).to(weight.dtype)
            grad_hidden[start : start + size] = grad @ weight
            del logits, log_probs  # the next chunk's need their place: 6 bytes for each of 2,048 x 151,936
            if not wants_weight:
                del grad
                continue
            product = grad.t() @ rows
            # Several chunks are summed in float32: rounding each partial sum to bfloat16 would bias the gradient.
            if grad_weight is None:
                grad_weight = product if one_chunk else product.float()
            else:
                grad_weight += product
            del grad, product
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(correct)
        return loss / divisor, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, None if grad_weight is None else grad_weight * grad_loss, None, None, None
