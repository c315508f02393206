"""What a merge into bfloat16 keeps of a LoRA adapter: rounded to the nearest, rounded by chance, not rounded.

    sft-dist train tasks model.lora={} model.dtype=bfloat16 run.name=lora     # any run with an adapter and verify_export: full
    python benchmarks/merging.py runs/lora

Of each layer's change, scale x B A, the share that the merged weight minus the base's holds along it (1: all of it, on
average); and how far the logits of the merged model, computed in float32, are from those that the trained model had, on
the rows of PROOF.json, as a share of their spread (root mean square, and the middle one of all places).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_dist.config.loader import load_run_config
from sft_dist.rundir import RunDir
from sft_dist.train.merging import rounded
from sft_dist.train.pretrained import resolve_model
from sft_dist.train.probes import last_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "merging.json")
    options = parser.parse_args()
    run = RunDir(options.run)
    config = load_run_config(run.config)
    trained = json.loads((run.model / "PROOF.json").read_text())["logits"]
    settings = json.loads((run.model / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(run.model / "adapter" / "adapter_model.safetensors")
    # float32, so that a sum that is not rounded fits in; the published one for what is not a linear layer.
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(resolve_model(config.model.name), dtype=torch.bfloat16).state_dict()
    ways: dict[str, Callable[[torch.Tensor, str], torch.Tensor]] = {
        "nearest": lambda exact, name: exact.bfloat16().float(),
        "by chance": lambda exact, name: rounded(exact, name).float(),
        "not rounded": lambda exact, name: exact,
    }
    results: dict[str, Any] = {}
    for way, rounding in ways.items():
        shares = []
        for name, weight in model.named_parameters():
            down = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
            if down not in adapter:
                continue
            change = adapter[down.replace("lora_A", "lora_B")].float() @ adapter[down].float()
            change *= settings["lora_alpha"] / settings["r"]
            start = base[name].float()
            weight.data = rounding(start + change, name)
            shares.append(float(((weight.data - start) * change).sum() / change.square().sum()))
        squares = torch.cat(
            [
                (last_logits(model, row, "cpu")[:, trained["columns"]] - torch.tensor(wanted)).double().square().mean(1)
                for row, wanted in zip(trained["rows"], trained["logits"], strict=True)
            ]
        )
        results[way] = {
            "share_of_the_change": {"mean": round(sum(shares) / len(shares), 4), "least": round(min(shares), 4)},
            "logits_apart": round(math.sqrt(float(squares.mean())) / trained["spread"], 4),
            "logits_apart_in_the_middle": round(math.sqrt(float(squares.median())) / trained["spread"], 4),
        }
        print(way, json.dumps(results[way]), flush=True)
    told = {"model": config.model.name, "learning_rate": config.train.learning_rate, "layers": len(shares), **results}
    options.output.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
