"""What a job's nodes will be, as far as the config says, so that a login node can prove a run that it could not train."""

from __future__ import annotations

from sft_dist.config.rules_slurm import gpus_of
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.hardware import gpu_named
from sft_dist.parallel.machine import Gpu, Machine, this_machine
from sft_dist.parallel.resolve import Resolved, resolve
from sft_dist.parallel.world import nodes_of

ASSUMED = "a100-80"


def resolve_for_job(config: Config) -> Resolved:
    """Decide every `auto` for the job's nodes. What they really are is decided again there."""
    machine, _ = job_machine(config)
    plan, count = config.parallel.plan, config.parallel.num_processes
    if not machine.gpus and plan not in ("auto", "cpu") and (plan == "single" or count == "auto"):
        tried = "" if plan == "single" else "; parallel.num_processes=2 tries the plan on the nodes' CPUs"
        raise ConfigError(
            f"parallel.plan is {plan!r}, but the job asks for no GPUs: slurm.gpus_per_node is {config.slurm.gpus_per_node or 'not set'}",
            hint=f"set slurm.gpus_per_node to the GPUs of a node (8, or h100:8), or parallel.plan=cpu{tried}",
        )
    resolved = resolve(config, machine, nodes_of(config.slurm.nodes))
    if resolved.layout.world_size > 1 and resolved.layout.plan.engine == "none":
        raise ConfigError(f"parallel.plan {resolved.plan} is one process, but the job has {config.slurm.nodes} nodes")
    return resolved


def job_machine(config: Config) -> tuple[Machine, str | None]:
    """A node of the job, and a line on what was assumed of it."""
    here = this_machine()
    kind, count = gpus_of(config.slurm)
    cores = config.slurm.cpus_per_task or here.cores
    note = None
    gpus: tuple[Gpu, ...] = ()
    if count:
        try:
            model = gpu_named(kind or ASSUMED)
        except ConfigError:
            if config.slurm.gpu is not None:
                raise
            kind, model = None, gpu_named(ASSUMED)  # a site's own name for its GPUs
        if kind is None:
            note = f"slurm.gpu is not set: proven as for {count} x {model.name}"
        gpus = (Gpu(model.name, model.memory_gib, 8.0 if model.bf16_tflops else 7.0),) * count
    machine = Machine(here.cpu, cores, here.cpu_bf16 and not gpus, here.memory_gib, gpus)
    return machine, note
