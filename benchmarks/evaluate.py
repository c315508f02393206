"""What asking in batches saves: answers a second against one prompt at a time, labels against the prompt once per label.

    python benchmarks/evaluate.py                         # 200 prompts, three rounds; results/evaluate.json
    python benchmarks/evaluate.py --prompts 40 --rounds 1
    python benchmarks/evaluate.py --engines --prompts 400 # on a GPU: evaluate.generation.engine, batches or continuous

SmolLM2-135M-Instruct on this machine's CPU, held-out rows of the synthetic tasks. One by one is transformers' own generate,
greedy, with a prompt at a time; the labels' baseline is one forward pass for each prompt and label. The two take turns on
the same blocks of 40 prompts, first one, then the other, so that both meet the same load. What both say is compared.
With --engines all prompts, letters and requests in turn, are asked at once, after some to warm up; what continuous
batching prepares each time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 40
LABELS = ("refund", "delivery", "technical", "billing", "account", "cancellation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder, such as a run's model")
    parser.add_argument("--engines", action="store_true", help="compare the engines on a GPU")
    parser.add_argument("--tasks", nargs="+", default=["extraction", "tickets", "labels"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluate.json")
    options = parser.parse_args()
    if options.engines:
        results = engines(load(options.model, options.dtype, "cuda"), options)
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(results))
        return
    from sft_dist.train.settle import settle_cpu

    settle_cpu()
    loaded = load(options.model, options.dtype)
    results: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    for task in options.tasks:
        work = labels(loaded, options) if task == "labels" else answers(loaded, task, options)
        for so_far in compared(work, options):
            results[task] = so_far
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(task, json.dumps(results[task]), flush=True)


def load(name: str, dtype: str, device: str = "cpu") -> Any:
    from sft_dist.config.schema import ModelConfig
    from sft_dist.evaluate.compare import Loaded
    from sft_dist.train.model import load_model
    from sft_dist.train.quiet import quiet_libraries
    from sft_dist.train.tokenizer import load_tokenizer

    quiet_libraries()
    spec = ModelConfig(name=name)
    tokens = load_tokenizer(spec)
    model = load_model(spec, tokens, dtype=dtype, attn_implementation="sdpa").eval()
    return Loaded(model.to(device), tokens.tokenizer)


def engines(loaded: Any, options: Any) -> dict[str, Any]:
    """Seconds of each engine for all prompts, round by round, and how many answers are those of batches of 16."""
    import torch

    from sft_dist.config.schema import GenerationConfig
    from sft_dist.evaluate.generate import generate

    half = options.prompts // 2
    prompts = [prompt for pair in zip(*(prompts_of(task, half) for task in ("extraction", "tickets")), strict=True) for prompt in pair]  # fmt: skip
    ways = {f"batches of {size}": {"engine": "batches", "batch_size": size} for size in (16, 64)}
    ways["continuous"] = {"engine": "continuous", "batch_size": 16}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peak, said = dict.fromkeys(ways, 0.0), dict[str, list[str]]()

    def ask(name: str, some: list[Any]) -> list[str]:
        fields = GenerationConfig(max_new_tokens=options.max_new_tokens, **ways[name])  # type: ignore[arg-type]
        return generate(loaded.model, loaded.tokenizer, some, fields)

    for name in ways:
        ask(name, prompts[:20])
    for turn in range(options.rounds):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            said[name] = ask(name, prompts)
            seconds[name].append(round(time.perf_counter() - began, 2))
            peak[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    first, *_ = said.values()
    same = {name: sum(one == other for one, other in zip(first, found, strict=True)) for name, found in said.items()}
    lengths = sorted(len(loaded.tokenizer(text)["input_ids"]) for text in first)
    return {
        "gpu": torch.cuda.get_device_name(), "model": options.model, "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens, "answer_tokens": {"median": lengths[len(lengths) // 2], "sum": sum(lengths)},
        "seconds": seconds, "peak_gib": peak, "same_as_the_first": same,
    }  # fmt: skip


def prompts_of(task: str, count: int) -> list[Any]:
    from sft_dist.data.sources import task_rows

    return [row["prompt"] for row in task_rows(task, count, 2)]


def compared(
    work: tuple[list[Any], Callable[[list[Any]], Any], Callable[[list[Any]], Any]], options: Any
) -> Iterator[dict[str, Any]]:
    """After each block, of all blocks so far: prompts a second of both ways, their ratio, how many results agree."""
    prompts, slow, fast = work
    seconds: dict[str, list[float]] = {"one_by_one": [], "batched": []}
    agree = total = 0
    for turn in range(options.rounds):
        for place, start in enumerate(range(0, len(prompts), BLOCK)):
            block, found = prompts[start : start + BLOCK], {}
            order = (("one_by_one", slow), ("batched", fast))
            for name, way in order if (turn + place) % 2 == 0 else order[::-1]:
                began = time.perf_counter()
                found[name] = way(block)
                seconds[name].append(time.perf_counter() - began)
            agree += sum(one == other for one, other in zip(found["one_by_one"], found["batched"], strict=True))
            total += len(block)
            ratios = [one / other for one, other in zip(seconds["one_by_one"], seconds["batched"], strict=True)]
            yield {
                "prompts": total,
                "prompts_per_s": {name: round(total / sum(values), 3) for name, values in seconds.items()},
                "ratio": round(sum(seconds["one_by_one"]) / sum(seconds["batched"]), 2),
                "ratio_of_blocks": [round(ratio, 2) for ratio in ratios],
                "same_results": f"{agree} of {total}",
                "load_1min": round(os.getloadavg()[0], 2),
            }


def answers(loaded: Any, task: str, options: Any) -> Any:
    import torch

    from sft_dist.config.schema import GenerationConfig
    from sft_dist.evaluate.generate import generate, prompt_ids, settings

    chosen = GenerationConfig(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    model, tokenizer = loaded.model, loaded.tokenizer

    def alone(block: list[Any]) -> list[str]:
        said = []
        with torch.inference_mode():
            for prompt in block:
                ids = torch.tensor([prompt_ids(tokenizer, prompt)])
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings(model, tokenizer, chosen),
                )
                said.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
        return said

    return prompts_of(task, options.prompts), alone, lambda block: generate(model, tokenizer, block, chosen)


def labels(loaded: Any, options: Any) -> Any:
    import torch

    from sft_dist.evaluate.likelihood import candidate, label_logprobs

    model, tokenizer = loaded.model, loaded.tokenizer

    def best(scores: dict[str, float]) -> str:
        return max(scores, key=lambda label: scores[label])

    def each(block: list[Any]) -> list[str]:
        found = []
        with torch.inference_mode():
            for prompt in block:
                scores = {}
                for label in LABELS:
                    option = candidate(tokenizer, prompt, label)
                    logits = model(input_ids=torch.tensor([option.ids]), use_cache=False).logits[0].log_softmax(-1)
                    values = [logits[i - 1, option.ids[i]] for i in range(option.first, len(option.ids))]
                    scores[label] = float(torch.stack(values).mean())
                found.append(best(scores))
        return found

    def shared(block: list[Any]) -> list[str]:
        return [best(scores) for scores in label_logprobs(model, tokenizer, block, LABELS, options.batch_size)]

    return prompts_of("tickets", options.prompts), each, shared


if __name__ == "__main__":
    main()
