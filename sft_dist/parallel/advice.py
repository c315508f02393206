"""What to change where nothing fits, each change with what it would take."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.schema_parallel import LoraConfig
from sft_dist.parallel.estimate import Cluster, Estimate, Job
from sft_dist.parallel.planner import allowed, best, nothing_possible, plan_all
from sft_dist.parallel.shares import GIB

# As far as the search for enough GPUs goes.
MOST_GPUS = 512
SHORTEST_ROW = 256


def advice(job: Job, cluster: Cluster) -> list[str]:
    """What to change so that it fits, each with what it would take; [] if what the config allows fits already."""
    candidates = allowed(job, cluster, plan_all(job, cluster))
    if best(candidates) is not None:
        return []
    if all(found.refused for found in candidates):
        return [nothing_possible(job, cluster, candidates).hint or ""]
    return [line for line in _changes(job, cluster) if line]


def _changes(job: Job, cluster: Cluster) -> Iterator[str]:
    config = job.config
    if config.train.gradient_checkpointing is False:
        yield _if_it_fits(
            job.changed(train={"gradient_checkpointing": "auto"}), cluster, "train.gradient_checkpointing=auto"
        )
    if config.train.per_device_train_batch_size != "auto":
        smaller = job.changed(train={"per_device_train_batch_size": "auto"})
        yield _if_it_fits(smaller, cluster, "train.per_device_train_batch_size=auto")
    if config.parallel.plan != "auto":
        yield _if_it_fits(job.changed(parallel={"plan": "auto"}), cluster, "parallel.plan=auto")
    free = _open(job)
    if config.parallel.offload == "none":
        yield _if_it_fits(free.changed(parallel={"offload": "cpu"}), cluster, "parallel.plan=auto parallel.offload=cpu")
    if config.model.lora is None:
        yield _if_it_fits(free.changed(model={"lora": LoraConfig()}), cluster, "model.lora={}")
        nf4 = free.changed(model={"lora": LoraConfig(quantization="nf4")})
        yield _if_it_fits(nf4, cluster, "'model.lora={quantization: nf4}'")
    yield _shorter_rows(free, cluster)
    yield _more_gpus(free, cluster)


def _open(job: Job) -> Job:
    """`job` with every decision left to the planner."""
    return job.changed(
        parallel={"plan": "auto"}, train={"gradient_checkpointing": "auto", "per_device_train_batch_size": "auto"}
    )


def _found(job: Job, cluster: Cluster) -> Estimate | None:
    return best(allowed(job, cluster, plan_all(job, cluster)))


def _if_it_fits(job: Job, cluster: Cluster, change: str) -> str:
    found = _found(job, cluster)
    if found is None:
        return ""
    host = f", {found.host / GIB:.0f} GiB of host memory a node" if found.layout.offload != "none" else ""
    return (
        f"{change}   {found.name}: {found.memory.needed / GIB:.1f} of {found.usable / GIB:.1f} GiB{host}, "
        f"{found.time.seconds:.1f} s a step"
    )


def _shorter_rows(job: Job, cluster: Cluster) -> str:
    length = job.rows.longest // 2
    while length >= SHORTEST_ROW:
        line = _if_it_fits(job.with_rows(length), cluster, f"data.max_length={length}")
        if line:
            return line
        length //= 2
    return ""


def _more_gpus(job: Job, cluster: Cluster) -> str:
    """The smallest number of GPUs of this kind on which a plan fits; nodes are filled as they are on the cluster."""
    per_node = max(8, cluster.gpus_per_node)
    count = cluster.gpus_per_node * cluster.nodes * 2
    while count <= MOST_GPUS:
        larger = Cluster(cluster.gpu, min(count, per_node), max(1, count // per_node))
        found = _found(job, larger)
        if found is not None:
            return (
                f"{count} GPUs (--gpus {larger.gpus_per_node} --nodes {larger.nodes})   {found.name}: "
                f"{found.memory.needed / GIB:.1f} of {found.usable / GIB:.1f} GiB each"
            )
        count *= 2
    return ""
