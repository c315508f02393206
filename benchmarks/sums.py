"""How many values at a time the proof's sums over shared parameters should take: nanoseconds a value, by the size of a part.

    python benchmarks/sums.py

bfloat16 values, on the device and, where that is a GPU, also from host memory, as the gathered tensors come. Median of three.
Memory is kept between sums, as in a training on a CPU: without `settle_cpu` 2^17 values and more take 3 ns or 8 to 10, by chance.
"""

from __future__ import annotations

import statistics
import time
from unittest import mock

from sft_dist.train.cpu import settle_cpu

settle_cpu()  # before torch comes in

import torch  # noqa: E402

from sft_dist.train import probes  # noqa: E402

POWERS = (14, 16, 17, 18, 21, 23, 25)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(1)  # as beside a training
    values = torch.randn(2**30 if on_gpu else 2**26, device=device, dtype=torch.bfloat16)
    places = {"device": values, **({"host": values.cpu()} if on_gpu else {})}
    for power in POWERS:
        with mock.patch.multiple(probes, AT_ONCE=2**power, AT_ONCE_GPU=2**power):
            found = {name: nanoseconds(held, device) for name, held in places.items()}
        print(
            f"2^{power} at once: " + ", ".join(f"{name} {ns:.3f} ns a value" for name, ns in found.items()), flush=True
        )


def nanoseconds(values: torch.Tensor, device: torch.device) -> float:
    took = []
    for _ in range(3):
        began = time.perf_counter()
        probes.sum_of_bits(values, device)  # ends in numbers on the host: nothing is left to wait for
        took.append(time.perf_counter() - began)
    return statistics.median(took) / values.numel() * 1e9


if __name__ == "__main__":
    main()
