"""What the trained model is compared on: a few rows that it is asked, and sums over parameters that no process holds whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.train.adapter import RECOMPUTING

if TYPE_CHECKING:
    import torch

    from sft_dist.parallel.resolve import Resolved
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.trainer import Trainer

# Rows that trained and published model are compared on, tokens of each at most, positions of each, words of the vocabulary.
ROWS, LONGEST, POSITIONS, COLUMNS = 4, 256, 8, 64
# Values of a parameter that are summed at a time, in 8 bytes each: they stay in a cache of a CPU, and are worth a GPU's kernels
# (benchmarks/sums.py).
AT_ONCE, AT_ONCE_GPU = 1 << 18, 1 << 23


def trained_logits(trainer: Trainer, resolved: Resolved) -> dict[str, Any] | None:
    """What the model, as the plan holds it, predicts for a few rows; every process must call it.

    `rows` are token ids, each up to an answer's end-of-turn token; `logits` those of the last POSITIONS tokens before it
    for some `columns` of the vocabulary, `spread` their standard deviation over all of it, and `stops` whether the end-of-turn
    token is the likeliest where it belongs. None where it would not be
    the published model's: base weights in 4 bits, rows that several GPUs share.
    """
    import torch

    lora = resolved.config.model.lora
    if resolved.layout.sequence_parallel_size > 1 or (lora is not None and lora.quantization != "none"):
        return None
    tokenizer = trainer.processing_class
    data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    eos = int(tokenizer.eos_token_id)
    rows = _probes(data, eos)
    if not rows:
        return None
    engine = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    model = trainer.model_wrapped if engine else trainer.accelerator.unwrap_model(trainer.model)
    was = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for these few rows
        found = [last_logits(model, row, trainer.accelerator.device) for row in rows]
    model.train(was)
    words = min(len(found[0][0]), len(tokenizer))  # rows that only fill the vocabulary up mean nothing
    columns = sorted({*(words * step // COLUMNS for step in range(COLUMNS)), eos})
    return {
        "rows": rows,
        "columns": columns,
        "logits": [[[float(f"{value:.6g}") for value in line] for line in part[:, columns].tolist()] for part in found],
        "stops": [row[-1] == eos and int(part[-1].argmax()) == eos for row, part in zip(rows, found, strict=True)],
        "spread": max(float(part[:, :words].std()) for part in found),
    }


def last_logits(model: Any, row: Sequence[int], device: Any) -> torch.Tensor:
    """[positions, vocabulary] in float32 on the host: what follows each of the last tokens of `row` but its last one."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([row[:-1]], device=device)
        return model(input_ids=ids, use_cache=False).logits[0, -POSITIONS:].float().cpu()  # type: ignore[no-any-return]


def _probes(data: Any, eos: int) -> list[list[int]]:
    """Token ids of the first rows, each up to its first trained end-of-turn token, or LONGEST of them."""
    rows = []
    for row in data.select(range(min(len(data), 4 * ROWS))):
        ids, labels = row["input_ids"], row["labels"]
        ends = [place for place, label in enumerate(labels) if label == eos and place > 0]
        rows.append(ids[: ends[0] + 1 if ends else LONGEST][-LONGEST:])
    return [row for row in rows if len(row) > 1][:ROWS]


def sums_of_shares(model: Any, dtype: str, device: Any, ranks: Ranks) -> dict[str, int]:
    """`sum_of_bits` of each trained parameter that ZeRO-3 or FSDP2 has shared out, whole and in `dtype`, by its name.

    Every process must call it; each reads its own share, and nothing is gathered but the sums.
    """
    import torch

    mine: dict[str, int] = {}
    for name, weight in model.named_parameters():
        share = _own_share(weight) if weight.requires_grad or not hasattr(model, "peft_config") else None
        if share is not None:
            values = share[0].to(getattr(torch, dtype)) if share[0].is_floating_point() else share[0]
            mine[name.replace(RECOMPUTING, "")] = sum_of_bits(values, device, share[1])
    everyones = ranks.everyones(mine)
    return {name: sum(sums[name] for sums in everyones) % 2**64 for name in mine if all(name in it for it in everyones)}


def sum_of_bits(values: torch.Tensor, device: Any, start: int = 0) -> int:
    """What tells one tensor from another, modulo 2^64: the sum of each value's bits times its place, counted from `start`.

    Those of a tensor's parts add up to that of the tensor.
    """
    import torch

    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    at_once = AT_ONCE if torch.device(device).type == "cpu" else AT_ONCE_GPU
    for part in torch.split(values.detach().reshape(-1), at_once):
        here = part.to(device)
        if here.is_floating_point():  # what is next to zero some conversions round to zero
            here = torch.where(here.abs() < torch.finfo(here.dtype).tiny, 0, here)
        places = torch.arange(start + 1, start + 1 + len(here), device=device)
        total += int((here.view(kinds[here.element_size()]) * places).sum())
        start += len(here)
    return total % 2**64


def _own_share(weight: Any) -> tuple[torch.Tensor, int] | None:
    """This process's values of a parameter and where they begin in it; none where others hold the same ones.

    None for a parameter that is whole, and for one that stands on NVMe.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if hasattr(weight, "ds_tensor"):
        share: torch.Tensor = weight.ds_tensor.detach().reshape(-1)
        start = weight.ds_tensor.ds_numel * weight.ds_zero_partition_rank
        left = max(0, weight.ds_numel - start)  # behind it the last share is filled up
        return (share[:left], start) if len(share) == weight.ds_tensor.ds_numel else None
    if not isinstance(weight, DTensor):
        return None
    mesh, coordinate = weight.device_mesh, weight.device_mesh.get_coordinate()
    local = weight.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    copies = [place for place, it in zip(coordinate or (), weight.placements, strict=True) if it.is_replicate()]
    return local[: 0 if any(copies) else None].reshape(-1), offset[0] * math.prod(weight.shape[1:])
