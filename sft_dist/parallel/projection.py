"""docs/scaling.md: what was measured on a few GPUs, what the planner says of it, and what follows for many (`make refs`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sft_dist.parallel.architecture import packaged, read_architecture
from sft_dist.parallel.calibration import points
from sft_dist.parallel.cost import StepTime, Work, step_time
from sft_dist.parallel.estimate import COMFORT
from sft_dist.parallel.hardware import NETWORK_SHARE, gpu_named
from sft_dist.parallel.memory import Batch, gpu_memory
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.shares import GIB
from sft_dist.parallel.traffic import CALL_S, RING_ACROSS_S, RING_INSIDE_S, TREE_INSIDE_S
from sft_dist.parallel.weights import weights_of

GPU = "h200"
MODELS = ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
# Plan, and whether parameters are gathered inside a node only.
CHOICES = (("ddp", False), ("zero1", False), ("zero2", False), ("zero3", False), ("fsdp2", False), ("fsdp2", True))
# Nodes of eight GPUs.
NODES = (1, 8, 128)
ROW, MICRO, STEP = 2048, 16384, 65536
TRAINED = 0.41
GLOBAL_TOKENS = 2**22

_TEXT = """\
# Scaling

What more GPUs leave of one GPU's speed: measured on up to four H200s of one host, counted for more. This page is generated
(`make refs`) from `benchmarks/results/scaling-h200x2.json`, `scaling-h200x4.json` and the planner's model ([planner.md](planner.md)). Nothing here
has run on more than four GPUs or on several real nodes.

## Measured, and what the planner says of it

{step:,} tokens a GPU and step in micro batches of {micro:,} with gradient checkpointing (Qwen3-0.6B: of {small:,} without), rows of {row:,} tokens
of which 41 % are trained, compiled layers, bfloat16. Speed is tokens a second and GPU, share that of one GPU's.

{measured}

Each is the median of two or three steps (Qwen3-0.6B: five or six), so that a few percent between two figures mean nothing. Of 4B, fsdp2's share
is about 3 points below what the planner says (copies into and out of gathered buffers, host time between steps), zero3's 2 below and 3
above: take that for the uncertainty of the projections inside a node. Of 0.6B, measured after the planner's constants
were fitted, zero3's is 6 above and fsdp2's 3, the others up to 2 below. Between nodes nothing was measured.

## Projected: as many tokens on each GPU

Nodes of eight H200s, {network:.0f} Gb/s of network for each GPU, of which {reached:.0%} arrives; as many tokens a GPU and step as above, so that the
global batch grows with the GPUs: 67 million tokens on 1,024, which is more than a fine-tuning wants (next section). Share of one
GPU's speed, and in brackets seconds of a step that nothing hides. "No": it does not fit with a tenth of the memory free.

{weak}

## Projected: the same global batch

{tokens:,} tokens a step in all, at most {micro:,} in a micro batch: what one would really do. Tokens a second of all GPUs in millions, and in
brackets how many times as fast as eight.

{strong}

- Communication that is exposed is what is left of it after the computing of its micro batch: at few tokens a GPU there is little to hide
  behind, and each call waits for its hops.
- fsdp2 with `parallel.hybrid_shard` gathers inside a node and sums gradients across: on many nodes it is the sharded plan that scales,
  as long as one node holds a copy.

## What is assumed

- A ring of N GPUs over M nodes takes (N - M) x {inside:.1f} us and (M - 1) x {across:.0f} us for its hops, a tree 2 x (7 x {tree:.0f} us + log2(M) x {across:.0f} us), a call {call:.1f} us:
  the numbers that NCCL itself chooses its algorithm by (src/graph/tuning.cc, protocol Simple). Not measured here.
- Each GPU has a network card of its own, no link is shared with other jobs, and no node is slower than the others. Stragglers and failures, of which
  1,024 GPUs have some each day, are not in it; [checkpoints.md](checkpoints.md) and [failures.md](failures.md) say what those cost.
- NVLink multicast and in-network reduction (SHARP) are off; they would help ddp and the zero plans.
"""


@dataclass(frozen=True)
class Case:
    """One projected run."""

    model: str
    plan: str
    nodes: int
    gpus_per_node: int
    hybrid: bool = False
    micro: int = MICRO
    micro_batches: int = STEP // MICRO

    @property
    def layout(self) -> Layout:
        return Layout(
            PLANS[self.plan],
            nodes=self.nodes,
            processes_per_node=self.gpus_per_node,
            compile_layers=True,
            gradient_checkpointing=True,
            hybrid_shard=self.hybrid and self.nodes > 1,
        )

    def time(self) -> StepTime:
        """The planner's estimate of a step."""
        architecture = read_architecture(packaged()[self.model], self.model)
        weights = weights_of(architecture, None, "bfloat16")
        work = Work(self.micro, min(ROW, self.micro), TRAINED)
        return step_time(architecture, weights, self.layout, self._batch(), work, gpu_named(GPU))

    def fits(self) -> bool:
        """Whether it leaves a tenth of the GPU free."""
        architecture = read_architecture(packaged()[self.model], self.model)
        needed = gpu_memory(architecture, weights_of(architecture, None, "bfloat16"), self.layout, self._batch()).needed
        return needed / GIB <= COMFORT * gpu_named(GPU).usable_gib(self.layout.world_size)

    def _batch(self) -> Batch:
        return Batch(rows=1, tokens_per_row=self.micro, accumulation=self.micro_batches)


def scaling_page() -> str:
    """The text of docs/scaling.md."""
    return _TEXT.format(
        step=STEP,
        micro=MICRO,
        small=2 * MICRO,
        row=ROW,
        tokens=GLOBAL_TOKENS,
        measured="\n".join(_measured()),
        weak="\n".join(_weak()),
        strong="\n".join(_strong()),
        network=gpu_named(GPU).network_gbps * 8,
        reached=NETWORK_SHARE,
        inside=RING_INSIDE_S * 1e6,
        across=RING_ACROSS_S * 1e6,
        tree=TREE_INSIDE_S * 1e6,
        call=CALL_S * 1e6,
    )


def _measured() -> Iterator[str]:
    yield "| model | plan | GPUs | speed | share | share that the planner says |"
    yield "|---|---|---|---|---|---|"
    runs = [
        point
        for point in points(["scaling-h200x2.json", "scaling-h200x4.json"])
        if point.speed and point.predicted_speed
    ]
    alone = {point.model: point for point in runs if point.gpus == 1}
    for point in runs:
        one = alone.get(point.model)
        shares = " | "
        if one is not None and one is not point:
            told, counted = (point.speed, one.speed), (point.predicted_speed, one.predicted_speed)
            shares = " | ".join(f"{many / single:.1%}" for many, single in (told, counted) if many and single)
        yield f"| {point.model.split('/')[-1]} | {point.plan} | {point.gpus} | {point.speed:,} | {shares} |"


def _weak() -> Iterator[str]:
    yield "| model | plan |" + "".join(f" {8 * nodes:,} GPUs |" for nodes in NODES)
    yield "|---|---|" + "---|" * len(NODES)
    for model in MODELS:
        alone = Case(model, "single", 1, 1).time().tokens_per_s_per_gpu
        for plan, hybrid in CHOICES:
            cases = [Case(model, plan, nodes, 8, hybrid) for nodes in NODES]
            cells = [_share(case, alone) if case.fits() else "no" for case in cases]
            yield f"| {model.split('/')[-1]} | {_named(plan, hybrid=hybrid)} | " + " | ".join(cells) + " |"


def _share(case: Case, alone: float) -> str:
    time = case.time()
    return f"{time.tokens_per_s_per_gpu / alone:.0%} ({time.communication:.2f})"


def _strong() -> Iterator[str]:
    yield "| model | plan |" + "".join(f" {8 * nodes:,} GPUs |" for nodes in NODES)
    yield "|---|---|" + "---|" * len(NODES)
    for model in MODELS:
        for plan, hybrid in CHOICES:
            cells, eight = [], 0.0
            for nodes in NODES:
                own = GLOBAL_TOKENS // (8 * nodes)
                case = Case(model, plan, nodes, 8, hybrid, min(MICRO, own), max(1, own // MICRO))
                speed = case.time().tokens_per_s_per_gpu * 8 * nodes
                eight = eight or speed
                cells.append(f"{speed / 1e6:.2f} ({speed / eight:.0f})" if case.fits() else "no")
            yield f"| {model.split('/')[-1]} | {_named(plan, hybrid=hybrid)} | " + " | ".join(cells) + " |"


def _named(plan: str, *, hybrid: bool) -> str:
    return f"{plan}, hybrid" if hybrid else plan
