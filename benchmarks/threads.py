"""How long waiting threads should spin: training speed alone, and with a second training on the same cores.

    python benchmarks/threads.py                 # libgomp's default against GOMP_SPINCOUNT=1000
    python benchmarks/threads.py 1000 10000 passive

Each figure is tokens a second of one process: forward and backward of 512 tokens, the median of 8. Needs libgomp, which
torch's Linux wheels bring.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        print(measure())
        return
    for setting in sys.argv[1:] or ["default", "1000"]:
        alone, pair = run_together(setting, 1), run_together(setting, 2)
        print(
            f"{setting:>8}  alone {alone[0]:5.0f}  two at once {pair[0]:5.0f} and {pair[1]:5.0f} tokens/s", flush=True
        )


def run_together(setting: str, processes: int) -> list[float]:
    """Tokens a second of each of so many simultaneous processes."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    if setting == "passive":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    elif setting != "default":
        environment["GOMP_SPINCOUNT"] = setting
    command = [sys.executable, __file__, "--worker"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [float(process.communicate()[0].splitlines()[-1]) for process in running]


def measure() -> float:
    import torch
    from transformers import AutoModelForCausalLM

    from sft_dist.train.pretrained import resolve_model
    from sft_dist.train.quiet import quiet_libraries

    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:smollm2-135m"), dtype=torch.bfloat16).train()
    tokens = torch.randint(0, model.config.vocab_size, (4, 128))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    return tokens.numel() / statistics.median(seconds)


if __name__ == "__main__":
    main()
