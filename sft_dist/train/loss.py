"""Cross-entropy of the trained tokens, its gradient computed in the same pass over the logits.

TRL's head computes the logits twice (once for the loss, once for the gradient) and, where there is no Triton, does so
for every position, trained or not. Here only the trained positions meet the head, once: three matrix products instead
of four. The gradient with respect to the logits is softmax(z) - onehot(target), divided by the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

# Logits of so many tokens exist at a time. On a CPU they should stay near the caches; a GPU wants long products.
CPU_CHUNK = 256
GPU_CHUNK = 4096
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
    config = model.config.get_text_config()
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and not any(getattr(config, name, None) for name in LOGIT_SETTINGS)
    )


def trained_token_loss(
    model: PreTrainedModel, inputs: dict[str, Any], num_items: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch summed over its trained tokens and divided by `num_items` (their own number if None).

    Returns three scalars: the loss (float32), the number of trained tokens, and how many of them the model predicts.
    """
    labels = inputs["labels"][:, 1:]
    backbone = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = model.base_model(**backbone, use_cache=False).last_hidden_state[:, :-1]
    trained = labels != -100
    targets = labels[trained]
    count = torch.as_tensor(targets.numel(), device=hidden.device)
    divisor = torch.as_tensor(count if num_items is None else num_items, device=hidden.device).clamp(min=1)
    loss, correct = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden[trained], model.get_output_embeddings().weight, targets, divisor
    )
    return loss, count, correct


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, H], weight [V, H], targets [N], divisor scalar -> loss, number of correct predictions."""
        device = hidden.device
        loss = torch.zeros((), dtype=torch.float32, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        # Evaluation under no_grad needs no gradient; needs_input_grad says so.
        wants_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_weight: torch.Tensor | None = None
        size = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        one_chunk = hidden.shape[0] <= size
        for start in range(0, hidden.shape[0], size):
            rows, wanted = hidden[start : start + size], targets[start : start + size, None]
            logits = rows @ weight.t()
            correct += (logits.argmax(-1, keepdim=True) == wanted).sum()
            log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            loss -= log_probs.gather(1, wanted).sum()
            if grad_hidden is None:
                continue
            grad = log_probs.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
            grad = grad.div_(divisor).to(weight.dtype)
            grad_hidden[start : start + size] = grad @ weight
            product = grad.t() @ rows
            # Several chunks are summed in float32: rounding each partial sum to bfloat16 would bias the gradient.
            if grad_weight is None:
                grad_weight = product if one_chunk else product.float()
            else:
                grad_weight += product
        if wants_gradient:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(correct)
        return loss / divisor, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None
