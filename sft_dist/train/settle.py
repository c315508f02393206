"""Before anything is trained: decide every `auto` for this process, settle what torch reads once, see that nothing is missing."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec

from sft_dist.config.schema import Config
from sft_dist.errors import PreflightError
from sft_dist.files import read_json, write_json, write_text
from sft_dist.parallel.launch_files import plan_files
from sft_dist.parallel.machine import this_machine
from sft_dist.parallel.resolve import MEMORY, Resolved, resolve
from sft_dist.parallel.world import World, forget_accelerate, nodes_of, this_world
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import newest_facts
from sft_dist.train.cpu import settle_cpu
from sft_dist.train.environment import environment
from sft_dist.train.ranks import Ranks

log = logging.getLogger(__name__)


def resolve_here(config: Config, *, nodes: int = 1, run: RunDir | None = None, world: World | None = None) -> Resolved:
    """Decide every `auto` for this process or those that were launched with it, and settle its threads and GPU.

    Must run before torch is imported: it reads the visible GPUs and the threads' settings once. A plan of several
    processes is only decided here, not settled: its workers do that. `nodes` is how many there are in the job whose
    workers this process will start; `run` is the run that goes on, if it does; `world` is the one that a worker knows.
    """
    world = world or this_world()
    if not world.launched and world.told is None:
        world = nodes_of(nodes)
    saved = newest_facts(run) if run else None
    given = read_json(run.deepspeed_given) if run else None
    resolved = resolve(config, this_machine(), world, saved, given)
    forget_accelerate(world)
    if resolved.layout.plan.engine != "none" and not world.launched:
        return resolved
    if resolved.plan == "single":
        # TRL refuses several visible GPUs in one process, since Trainer would wrap the model in DataParallel.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if resolved.use_cpu:
        settle_cpu()
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from sft_dist.train.quiet import quiet_libraries

    quiet_libraries()
    if not resolved.use_cpu and not torch.cuda.is_available():
        raise PreflightError(
            f"nvidia-smi lists a GPU, but this torch ({torch.__version__}) cannot use it",
            hint="install a CUDA build of torch that fits the driver, or set parallel.plan=cpu",
        )
    if "OMP_NUM_THREADS" not in os.environ and (resolved.use_cpu or config.parallel.offload == "none"):
        # Beside a GPU the host's tensors are small: to join 32 rows took 5 to 11 ms on one thread, 20 to 36 on two.
        torch.set_num_threads(resolved.num_threads if resolved.use_cpu else 1)
    return resolved


def as_main(ranks: Ranks, decide: Callable[[], Resolved], num_threads: int) -> Resolved:
    """What the main process decides, on every process: hosts may differ, a plan may not. The threads are this host's."""
    return dataclasses.replace(ranks.by_main(decide), num_threads=num_threads)


def needs_packages(config: Config, resolved: Resolved) -> None:
    """Raise PreflightError unless the packages beside the basic ones that the plan and the adapter need are installed."""
    lora = config.model.lora
    plan = f"parallel.plan is {resolved.plan}"
    nf4 = lora is not None and lora.quantization != "none"
    asked = {metric for it in config.evaluate.all_sets for metric in it.metrics}
    overlap = sorted(asked & {"bleu", "chrf"})
    wanted = (
        (
            resolved.layout.plan.engine == "deepspeed",
            "deepspeed",
            plan,
            "or choose fsdp2 or ddp, which need nothing else",
        ),
        (lora is not None, "peft", "model.lora is set", "or train all weights: model.lora=null"),
        (nf4, "bitsandbytes", "model.lora.quantization is nf4", "or set model.lora.quantization=none"),
        ("rouge" in asked, "rouge_score", "evaluate.sets asks for rouge", "or take that metric out"),
        (config.evaluate.harness is not None, "lm_eval", "evaluate.harness is set", "or take that section out"),
        (bool(overlap), "sacrebleu", f"evaluate.sets asks for {' and '.join(overlap)}", "or take that out"),
    )
    extras = {"deepspeed": "deepspeed", "peft": "lora", "bitsandbytes": "qlora"}
    extras |= {"rouge_score": "metrics", "sacrebleu": "metrics", "lm_eval": "harness"}
    for needed, package, why, otherwise in wanted:
        if needed and find_spec(package) is None:
            raise PreflightError(
                f"{why}, but the package {package} is not installed",
                hint=f"pip install 'sft-dist[{extras[package]}]', {otherwise}",
            )


def unused_packages(config: Config, resolved: Resolved) -> tuple[str, ...]:
    """Optional packages that libraries would import only because they are installed, and that this run has no use for.

    PEFT imports bitsandbytes, which compiles functions as it is imported, and TRL imports wandb. Neither has a switch for
    it (PEFT 0.21, helpers.py; TRL 1.16, trainer/base_trainer.py).
    """
    if config.train.extra or resolved.given:  # arguments of the libraries' own may need either
        return ()
    wanted = (
        (config.model.lora is not None, "bitsandbytes"),  # also for a base model that was published in 4 bits
        ("wandb" in config.tracking.report_to, "wandb"),
    )
    return tuple(package for needed, package in wanted if not needed)


def record_environment(run: RunDir, resolved: Resolved) -> None:
    """Write env.json and the plan's settings in plan/, and log what `auto` was decided to be.

    What memory it takes is said once, by `record_refined`.
    """
    _write_environment(run, resolved)
    for line in resolved.decisions:
        if not line.startswith(MEMORY):
            log.info("%s", line)


def record_refined(run: RunDir, resolved: Resolved, before: Resolved) -> None:
    """Once the rows are known: put on record and log what they changed of `before`, and say what memory it takes."""
    if resolved != before:
        _write_environment(run, resolved)
    for line in resolved.decisions:
        if line.startswith(MEMORY) or line not in before.decisions:
            log.info("%s", line)


def _write_environment(run: RunDir, resolved: Resolved) -> None:
    write_json(run.env, environment(this_machine(), resolved))
    for name, text in plan_files(resolved.layout, resolved.given).items():
        write_text(run.plan / name, text)
    if resolved.given:
        write_json(run.deepspeed_given, dict(resolved.given))
    else:
        run.deepspeed_given.unlink(missing_ok=True)
