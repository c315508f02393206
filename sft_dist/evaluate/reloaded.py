"""A published model, loaded as its readers load it, against what is on record of the trained one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_dist.evaluate.against_base import base_folder, name_problems
from sft_dist.evaluate.tensor_files import headers
from sft_dist.export import ADAPTER, ROWS_OF

# Largest distance of the logits, as a share of their spread over the vocabulary: of the middle one of all places (half are
# nearer), and the root mean square of all. A mixture of experts whose router turns over moves a few places far.
TOLERANCE = {"float32": (0.01, 0.01), "bfloat16": (0.1, 0.3)}


def tokenizer_problems(folder: Path, proof: dict[str, Any]) -> Iterator[str]:
    from transformers import AutoTokenizer

    from sft_dist.train.tokenizer import tokenizer_facts

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=proof["base"]["trust_remote_code"])
    except (OSError, ValueError) as error:
        yield f"the tokenizer cannot be loaded: {error}"
        return
    found = tokenizer_facts(tokenizer)
    for what in ("vocabulary", "chat_template", "special", "texts"):
        if found[what] != proof["tokenizer"][what]:
            yield f"the tokenizer is another one than was trained with ({what.replace('_', ' ')})"


def reloaded(folder: Path, proof: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Load the model as its readers do; adds to `problems` what it misses, where it would not stop, and how far off it predicts."""
    from sft_dist.train.quiet import quiet_libraries

    quiet_libraries()
    if "model" not in proof["tensors"] and base_folder(proof) is None:
        return {"stops": "not loaded: the base model, beside which the adapter works, is not here"}
    model, complaints = _loaded(folder, proof)
    problems += complaints
    if model is None:
        return {}
    eos = proof["tokenizer"]["special"]["eos"]
    ends = model.generation_config.eos_token_id if model.generation_config else None
    # Beside an adapter alone its readers take the base model's settings; ours say where it ends.
    if "model" in proof["tensors"] and eos not in (ends if isinstance(ends, list) else [ends]):
        problems.append(f"generation would not end at the end-of-turn token {eos}, but at {ends}")
    if proof["logits"] is None:
        return {"stops": "not looked at: no logits of the training model are on record to compare with"}
    return _predictions(model, proof, problems)


def _predictions(model: Any, proof: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Compare the model's logits, and where it stops, with those of the trained one; adds to `problems`."""
    import torch

    from sft_dist.train.probes import last_logits

    trained, eos = proof["logits"], proof["tokenizer"]["special"]["eos"]
    places, rows, stops, ended = [], 0, 0, trained.get("stops", [])
    middle_limit, limit = TOLERANCE[proof["dtype"]]
    for number, (row, wanted) in enumerate(zip(trained["rows"], trained["logits"], strict=True)):
        found = last_logits(model, row, "cpu")
        places.append((found[:, trained["columns"]] - torch.tensor(wanted)).double().square().mean(1))
        last = found[-1]
        rows, stops = rows + (row[-1] == eos), stops + int(row[-1] == eos and int(last.argmax()) == eos)
        # A tie that rounding decides otherwise is none of its faults.
        behind = float(last.max() - last[eos]) / trained["spread"]
        if number < len(ended) and ended[number] and behind > limit:
            problems.append(
                f"after an answer its likeliest token is {int(last.argmax())}, where the trained model stops"
            )
    squares = torch.cat(places)
    apart = math.sqrt(float(squares.mean())) / trained["spread"]
    middle = math.sqrt(float(squares.median())) / trained["spread"]
    if not (middle <= middle_limit and apart <= limit):
        problems.append(
            f"its logits are {apart:.2g} of their spread away from the trained model's, {middle:.2g} in the middle; more than "
            f"{limit:g} or {middle_limit:g}"
        )
    return {
        "logits_apart": round(apart, 6),
        "logits_apart_middle": round(middle, 6),
        "tolerance": limit,
        "tolerance_middle": middle_limit,
        "stops": f"after {stops} of {rows} expected answers the end-of-turn token is the likeliest next one",
    }


def _loaded(folder: Path, proof: dict[str, Any]) -> tuple[Any, list[str]]:
    """The model, or None and what transformers misses in its files; and what its tensors are not."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"dtype": getattr(torch, proof["dtype"]), "attn_implementation": proof["attn_implementation"]}
    settings["trust_remote_code"] = proof["base"]["trust_remote_code"]
    source, revision = str(folder), None
    if "model" not in proof["tensors"]:
        from sft_dist.train.pretrained import resolve_model

        source, revision = resolve_model(proof["base"]["name"]), proof["base"]["revision"]
    model, told = AutoModelForCausalLM.from_pretrained(source, revision=revision, output_loading_info=True, **settings)
    bad = [f"{len(names)} {kind.replace('_', ' ')}" for kind, names in told.items() if names]
    if bad:
        return None, [f"transformers reads it with {', '.join(bad)}"]
    if "model" not in proof["tensors"]:
        return _with_adapter(model, folder, proof).eval(), []
    return model.eval(), [
        *_type_problems(model, folder, proof),
        *name_problems(set(proof["tensors"]["model"]), *_architecture(model, proof)),
    ]


def _type_problems(model: Any, folder: Path, proof: dict[str, Any]) -> Iterator[str]:
    """Tensors that the file holds in another type than the config's, unless the model itself keeps them in it.

    Not the base's own type: float32 or float16 files are trained and published in bfloat16.
    """
    from sft_dist.train.publish import DTYPES

    ours = DTYPES[f"torch.{proof['dtype']}"]
    held = {name: DTYPES[str(tensor.dtype)] for name, tensor in model.state_dict().items()}
    for name, (dtype, _, _) in headers(folder).items():
        if name in held and dtype not in (ours, held[name]):
            yield f"{name} is {dtype}, and a model with this config.json holds it in {held[name]}"


def _architecture(model: Any, proof: dict[str, Any]) -> tuple[set[str], dict[str, str]]:
    """Names of the tensors of a model with the base's settings, as files have them that `model` is read from, and names that are
    tied; nothing if the settings are not here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    base = base_folder(proof)
    if base is None:
        return set(), {}
    trust = proof["base"]["trust_remote_code"]
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    if getattr(config, "quantization_config", None):
        return set(), {}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    # Experts are joined and names changed in loading; files have them as the base's files have.
    empty._weight_conversions = getattr(model, "_weight_conversions", None)
    names = set(revert_weight_conversion(empty, empty.state_dict()))
    return names, dict(getattr(empty, "all_tied_weights_keys", None) or {})


def _with_adapter(model: Any, folder: Path, proof: dict[str, Any]) -> Any:
    from peft import PeftModel

    if proof["vocabulary_rows"] > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(proof["vocabulary_rows"], pad_to_multiple_of=ROWS_OF, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(folder / ADAPTER)).get_base_model()
