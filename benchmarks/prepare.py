"""How fast rows become tokens, labels and packed rows: sft-dist's preparation and TRL's own, in turns.

    python benchmarks/prepare.py --rounds 3                              # 8,000 chats of about 500 tokens
    python benchmarks/prepare.py --rounds 3 --text docstrings            # the same from text that people wrote
    python benchmarks/prepare.py --rows 1000000 --words 20 --only ours   # memory, with many short ones

Made rows are drawn from a few thousand words, which favours whoever remembers words; docstrings of the installed packages have the
many rare words, signs and indented lines of real text.

Every measurement is a process of its own with empty caches, so that nothing is warm; its clock starts when the libraries are
imported and the tokenizer is loaded. Where others use the machine, too, seconds of CPU say more than those of the clock. Peak memory
is that of all its processes together (the sum of their proportional shares), looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "row",
    "of",
    "text",
    "and",
    "learns",
    "which",
    "token",
    "comes",
    "next",
    "when",
    "people",
    "ask",
    "about",
    "orders",
    "letters",
    "numbers",
    "rivers",
    "cities",
    "trains",
    "weather",
    "music",
    "cooking",
    "history",
    "science",
    "gardens",
    "computers",
    "networks",
    "memory",
    "language",
    "pictures",
    "stories",
    "plans",
]


def write_rows(path: Path, count: int, words: int, text: str = "made") -> None:
    """Chats of one to three turns whose lengths vary around `words` words."""
    rng = random.Random(0)
    written = docstrings() if text == "docstrings" else None
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            turns = rng.randrange(1, 4)
            messages = []
            for turn in range(2 * turns):
                length = max(2, int(rng.lognormvariate(0, 0.5) * words / (2 * turns)))
                content = next_of(written, length) if written else made(rng, length)
                messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            stream.write(json.dumps({"messages": messages}) + "\n")


def made(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) * (rng.random() < 0.1) for _ in range(length))


def docstrings() -> Iterator[str]:
    """The lines of the docstrings of all installed packages, each docstring once. Ends where these end."""
    seen = set()
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        for found in re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8", errors="ignore"), re.DOTALL):
            if len(found) > 200 and found not in seen:
                seen.add(found)
                yield from found.strip().splitlines(keepends=True)


def next_of(lines: Iterator[str], length: int) -> str:
    """The next lines that have at least `length` words together."""
    text, words = "", 0
    while words < length or not text.strip():
        line = next(lines)
        text, words = text + line, words + len(line.split())
    return text


def cpu_seconds() -> float:
    """What this process and those that it has waited for have computed."""
    return sum(os.times()[:4])


def ours(rows: Path, folder: Path, model: str, max_length: int) -> dict[str, float]:
    """Prepare with sft-dist."""
    import datasets  # noqa: F401

    from sft_dist.config.schema import Config
    from sft_dist.data.prepare import prepare
    from sft_dist.train.tokenizer import load_tokenizer

    data = {"train": {"path": str(rows)}, "max_length": max_length, "packing": True}
    config = Config.model_validate({"model": {"name": model, "chat_template": "chatml"}, "data": data})
    tokens = load_tokenizer(config.model)
    started, computed = time.perf_counter(), cpu_seconds()
    made = prepare(config, tokens.tokenizer, tokens.template, folder)
    seconds, computed = time.perf_counter() - started, cpu_seconds() - computed
    started = time.perf_counter()
    prepare(config, tokens.tokenizer, tokens.template, folder)
    counts = made.ledger["train"]
    return {
        "seconds": seconds,
        "cpu_seconds": computed,
        "hit_seconds": time.perf_counter() - started,
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained_tokens"],
        "fill": counts["packing_fill"],
    }


def trls(rows: Path, folder: Path, model: str, max_length: int, processes: int | None) -> dict[str, float]:
    """Prepare as TRL's SFTTrainer does with packing and assistant_only_loss, on the same template."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    from sft_dist.config.schema import ModelConfig
    from sft_dist.train.tokenizer import load_tokenizer

    disable_progress_bars()
    tokens = load_tokenizer(ModelConfig(name=model, chat_template="chatml"))
    tokens.tokenizer.chat_template = tokens.template.training_text
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokens.tokenizer), **shape))
    settings = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        packing=True,
        max_length=max_length,
        assistant_only_loss=True,
        dataset_num_proc=processes,
    )
    started, computed = time.perf_counter(), cpu_seconds()
    dataset = Dataset.from_json(str(rows), cache_dir=str(folder / "json"))
    trainer = SFTTrainer(model=small, args=settings, train_dataset=dataset, processing_class=tokens.tokenizer)
    seconds, computed = time.perf_counter() - started, cpu_seconds() - computed
    started = time.perf_counter()
    SFTTrainer(model=small, args=settings, train_dataset=dataset.select([0]), processing_class=tokens.tokenizer)
    trainer_seconds = time.perf_counter() - started
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    trained = sum(label != -100 for row in trainer.train_dataset["labels"] for label in row)
    return {
        "seconds": seconds,
        "cpu_seconds": computed,
        "trainer_seconds": trainer_seconds,
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "fill": sum(lengths) / (max_length * len(lengths)),
    }


def measured(arm: str, arguments: argparse.Namespace, rows: Path) -> dict[str, float]:
    """Run one arm in a process of its own; adds the peak of memory of all its processes in MB."""
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--arm", arm, "--file", str(rows), "--folder", folder]
        command += ["--model", arguments.model, "--max-length", str(arguments.max_length)]
        command += ["--trl-processes", str(arguments.trl_processes)] if arguments.trl_processes else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        peak = [0]
        watcher = threading.Thread(target=watch, args=(process, peak), daemon=True)
        watcher.start()
        out = process.communicate()[0]
        watcher.join()
        if process.returncode:
            sys.exit(f"{arm} failed")
    return {**json.loads(out.splitlines()[-1]), "peak_mb": round(peak[0] / 1024), "load_before": load}


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keep the largest sum of proportional memory (kB) of a process and its descendants in `peak`."""
    while process.poll() is None:
        total = 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if int((path / "stat").read_text().rpartition(")")[2].split()[3]) != process.pid:  # its session
                    continue
                lines = (path / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except (OSError, ValueError, IndexError):
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--words", type=int, default=400, help="words of a chat")
    parser.add_argument("--text", choices=["made", "docstrings"], default="made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--trl-processes", type=int, help="TRL's dataset_num_proc (default: TRL's own, one process)")
    parser.add_argument("--only", choices=["ours", "trl"])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        given = arguments.file, arguments.folder, arguments.model, arguments.max_length
        print(json.dumps(ours(*given) if arguments.arm == "ours" else trls(*given, arguments.trl_processes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, arguments.rows, arguments.words, arguments.text)
        arms = [arguments.only] if arguments.only else ["ours", "trl"]
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for number in range(arguments.rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                found[arm].append(measured(arm, arguments, rows))
                print(arm, json.dumps(found[arm][-1]), flush=True)
    described = {
        "rows": arguments.rows,
        "words": arguments.words,
        "text": arguments.text,
        "trl_processes": arguments.trl_processes,
    }
    result = {**described, "max_length": arguments.max_length, "runs": found}
    for arm, runs in found.items():
        result[f"{arm}_median_s"] = round(statistics.median(run["seconds"] for run in runs), 2)
        result[f"{arm}_median_cpu_s"] = round(statistics.median(run["cpu_seconds"] for run in runs), 2)
    if len(arms) == 2:
        pairs = list(zip(found["ours"], found["trl"], strict=True))
        result["times_as_fast"] = [round(theirs["seconds"] / own["seconds"], 2) for own, theirs in pairs]
        # Making a trainer of one row takes this of TRL's seconds, which is no preparation.
        rest = [theirs["seconds"] - theirs["trainer_seconds"] for _, theirs in pairs]
        result["times_as_fast_without_trainer"] = [
            round(theirs / own["seconds"], 2) for (own, _), theirs in zip(pairs, rest, strict=True)
        ]
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
