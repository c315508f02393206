"""The final model: written, read back, compared, and only then published as model/ with DONE."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError
from sft_dist.export import ADAPTER, PROOF, file_hash, is_local, write_card
from sft_dist.files import publish_dir, read_json, told_by, utc_now, write_json
from sft_dist.parallel.world import unlaunched
from sft_dist.rundir import RunDir
from sft_dist.train.adapter import RECOMPUTING, adapter_weights, name_in_adapter, save_adapter
from sft_dist.train.environment import versions
from sft_dist.train.merging import merged
from sft_dist.train.probes import sum_of_bits, sums_of_shares, trained_logits
from sft_dist.train.tokenizer import tokenizer_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sft_dist.parallel.resolve import Resolved
    from sft_dist.train.ranks import Ranks
    from sft_dist.train.tokenizer import RunTokenizer
    from sft_dist.train.trainer import Trainer

log = logging.getLogger(__name__)
# torch's types by the names that safetensors gives them.
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.bool": "BOOL",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
}  # fmt: skip


def publish_model(
    run: RunDir, config: Config, resolved: Resolved, trainer: Trainer, tokens: RunTokenizer, ranks: Ranks
) -> None:
    """Put weights, tokenizer, model card and DONE into model/, all at once, from whatever shards the plan keeps.

    Of a LoRA run the adapter goes into model/adapter/, and model/ is the base model with the adapter merged into it, or
    no model of its own without `model.lora.merge`. Every process must call it; the main one gathers what was trained in
    host memory and writes. Raises CheckpointError if what was written is not what was trained.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = config.model.lora
    full = config.checkpoint.verify_export == "full"
    logits = trained_logits(trainer, resolved) if full else None
    weights = whole_weights(trainer, model) if lora is None else adapter_weights(trainer, model, resolved.dtype)
    shared = sums_of_shares(model, resolved.dtype, trainer.accelerator.device, ranks)
    if ranks.is_main:
        lost = lost_in_gathering(trainer, model, weights, shared)
        if lost:
            raise CheckpointError(f"the final model is not published: gathering it lost what was trained: {lost}")
        make_way(run)
        with publish_dir(run.model) as staged:
            expected: dict[str, Any] = {}
            if lora is not None:
                save_adapter(model, staged / ADAPTER, weights)
                expected["adapter"] = expectations(weights)
            if lora is not None and lora.merge:
                model = merged(config.model, tokens, staged / ADAPTER, resolved.dtype)
                weights = model.state_dict()
            if lora is None or lora.merge:
                weights = as_stored(model, weights)
                given = dict(weights)  # which it empties
                model.save_pretrained(staged, state_dict=given, save_original_format=False)
                # It names the type of the model's own weights, which are float32 masters under FSDP2.
                settings = read_json(staged / "config.json")
                write_json(staged / "config.json", {**settings, "dtype": resolved.dtype})
                expected["model"] = expectations(weights)
            del weights, model  # room for the process that loads what was written
            tokens.tokenizer.save_pretrained(staged)
            _compare(run, config, resolved, tokens, staged, {"tensors": expected, "logits": logits})
            write_card(run, config, versions(), staged)
            (staged / "DONE").write_text(utc_now() + "\n", encoding="utf-8")
    ranks.barrier()


def make_way(run: RunDir) -> None:
    """Remove what earlier attempts have left: a model without DONE, and copies of those that were killed while they published."""
    if run.model.exists():  # the caller has looked for DONE
        shutil.rmtree(run.model)
    for left in run.path.glob(f".{run.model.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _compare(
    run: RunDir, config: Config, resolved: Resolved, tokens: RunTokenizer, staged: Path, trained: dict[str, Any]
) -> None:
    """Have a fresh process compare what was written with what was trained; both are put on record in PROOF.json."""
    # It is loaded on a CPU, where GPUs' kernels are not; eager attention computes what any of them does.
    attention = "sdpa" if resolved.padding_free or resolved.attn_implementation == "sdpa" else "eager"
    proof = {
        "format": 1,
        "level": config.checkpoint.verify_export,
        "dtype": resolved.dtype,
        "attn_implementation": attention,
        "base": {
            **config.model.model_dump(mode="json", include={"name", "revision", "trust_remote_code"}),
            "local": is_local(config.model.name),
        },
        "added_tokens": len(tokens.pieces),
        "vocabulary_rows": len(tokens.tokenizer),
        "tokenizer": tokenizer_facts(tokens.tokenizer),
        **trained,
        "files": {
            str(path.relative_to(staged)): file_hash(path)
            for path in sorted(staged.rglob("*"))
            if path.is_file() and path.suffix != ".safetensors"
        },
    }
    write_json(staged / PROOF, proof)
    found = _prove(run, staged)
    write_json(staged / PROOF, {**proof, **found})
    logits = trained["logits"]
    if logits is not None and not any(logits["stops"]):
        log.warning("the trained model may not stop by itself: %s", found["stops"])


def whole_weights(trainer: Trainer, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every weight, whole, in the type that the model computes in; complete on the main process only."""
    import torch

    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        gathered = model.state_dict()
    weights = _tied_once(dict(gathered or {}), getattr(model, "all_tied_weights_keys", None) or {})
    if trainer.accelerator.mixed_precision != "bf16":
        return weights
    # FSDP2's shards are the float32 masters; what the model computes with, and every other plan publishes, is bfloat16.
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def _tied_once(weights: dict[str, torch.Tensor], tied: dict[str, str]) -> dict[str, torch.Tensor]:
    """Without the second name of a tied weight: gathering made a copy of it, which would be stored as another weight."""
    import torch

    twice = [
        name for name, source in tied.items() if name in weights and source in weights and name != source
        if torch.equal(weights[name], weights[source])
    ]  # fmt: skip
    return {name: weight for name, weight in weights.items() if name not in twice}


def as_stored(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` by the names, and cut as, the base model's files have them: transformers 5 joins experts when it loads them.

    save_pretrained would do so by itself, and what it wrote would not be what is on record.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, weights)
    return stored


def lost_in_gathering(
    trainer: Trainer, model: PreTrainedModel, weights: Mapping[str, torch.Tensor], shared: Mapping[str, int]
) -> str | None:
    """A trained parameter that `weights`, what is to be saved, lacks or has with other values; None if there is none.

    The hashes on record are those of `weights`, so that nothing later could tell. Under ZeRO-3 and FSDP2 no process holds
    whole parameters: there their sums are compared, which `shared` has.
    """
    import torch

    deepspeed = trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_partition_weights()
    whole, adapted = not (deepspeed or trainer.is_fsdp_enabled), hasattr(model, "peft_config")
    device, tied = trainer.accelerator.device, getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    live: dict[int, torch.Tensor] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.requires_grad or not adapted:
            live[id(weight)] = weight.detach()
            names.setdefault(id(weight), []).append(name.replace(RECOMPUTING, ""))
    for key, weight in live.items():
        own = names[key]
        places = [*own, *(tied[name] for name in own if name in tied), *map(name_in_adapter, own)]
        its_sum = next((shared[name] for name in own if name in shared), None)

        def is_it(saved: torch.Tensor, weight: torch.Tensor = weight, its_sum: int | None = its_sum) -> bool:
            if not whole:
                return its_sum is None or its_sum == sum_of_bits(saved, device)
            return torch.equal(saved, weight.to(saved.device, saved.dtype))

        found = [weights[name] for name in places if name in weights][:1]
        # What PEFT has named otherwise must be there under some name.
        if not any(map(is_it, found or (weights.values() if adapted else ()))):
            return own[0]
    return None


def expectations(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Type (as safetensors writes it), shape and hash of each tensor; `same_as` names one that shares its memory."""
    import torch
    import xxhash

    facts: dict[str, dict[str, Any]] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, weight in weights.items():
        place = first.setdefault((weight.data_ptr(), tuple(weight.shape)), name)
        if place != name and weight.numel():
            facts[name] = {**facts[place], "same_as": place}
            continue
        content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = xxhash.xxh3_128(content.data).hexdigest()
        facts[name] = {"dtype": DTYPES[str(weight.dtype)], "shape": list(weight.shape), "hash": digest}
    return facts


def _prove(run: RunDir, staged: Path) -> dict[str, Any]:
    """What a fresh process says of the model in `staged`. CheckpointError if it is not what was trained: it is kept."""
    environment = unlaunched()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        environment.pop("OMP_NUM_THREADS", None)  # one for each process of torchrun, which wait meanwhile
    command = [sys.executable, "-m", "sft_dist.evaluate.prove", str(staged)]
    # In a session of its own: Ctrl-C is for the training, which finishes what it publishes.
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False, start_new_session=True
    )
    told = told_by(done.stdout)
    if done.returncode == 0 and "checked" in told:
        return told
    refused = run.path / "model-refused"
    shutil.rmtree(refused, ignore_errors=True)
    staged.rename(refused)
    hint = f"what was written is in {refused}, to be looked at"
    if "message" not in told:
        hint += f" again: {Path(sys.executable).name} -m sft_dist.evaluate.prove {refused}"
        told["message"] = f"the process that looked at it ended with status {done.returncode} and no verdict"
    raise CheckpointError(f"the final model is not published: {told['message']}", hint=hint)
