"""What DeepSpeed, FSDP2, PEFT, TRL and accelerate cannot combine, each with the way out.

The comments name where the libraries say so, as of DeepSpeed 0.19.8, accelerate 1.15, transformers 5.23, TRL 1.16, PEFT
0.21 and torch 2.13. What depends on the model or the machine is judged where those are known.
"""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.schema import Config
from sft_dist.config.spelling import Problem, shown

ZERO = ("zero1", "zero2", "zero3")
SHARDED = (*ZERO, "fsdp2")
# accelerate/accelerator.py, ddp_handler: read where the plan is ddp, by nothing else.
OF_DDP = ("ddp_bucket_cap_mb", "ddp_static_graph")
RECOMPUTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")


def parallel_problems(config: Config) -> Iterator[Problem]:
    """Each contradiction that `parallel` and `model.lora` have with each other and with the rest."""
    for check in (
        _processes,
        _offload,
        _hybrid,
        _shared_rows,
        _lora,
        _quantization,
        _recomputing,
        _ddp_only,
        _skipping,
    ):
        yield from check(config)


def _one_of(plans: tuple[str, ...]) -> str:
    return f"{', '.join(plans[:-1])} or {plans[-1]}" if len(plans) > 1 else plans[0]


def _processes(config: Config) -> Iterator[Problem]:
    plan, count = config.parallel.plan, config.parallel.num_processes
    if plan in ("cpu", "single") and count not in ("auto", 1):
        what = "one process on the CPU" if plan == "cpu" else "one process with one GPU"
        text = f"{count} contradicts plan {plan}, which is {what}; set parallel.plan=ddp, or take it out"
        yield Problem("parallel.num_processes", text, ("parallel.plan",))


def _offload(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    # deepspeed/runtime/zero/stage_1_and_2.py: any device but "none" means host memory there, so that nvme would be
    # taken for cpu in silence; FSDP2 has CPUOffloadPolicy only (accelerate, FullyShardedDataParallelPlugin.cpu_offload).
    able = {"none": None, "cpu": SHARDED, "nvme": ("zero3",)}[parallel.offload]
    if able is not None and parallel.plan not in ("auto", *able):
        text = f"'{parallel.offload}' is not possible with plan {parallel.plan}; set parallel.plan={_one_of(able)}"
        yield Problem("parallel.offload", text, ("parallel.plan",))
    if parallel.offload == "nvme" and parallel.nvme_path is None:
        # deepspeed/runtime/zero/partition_parameters.py: "nvme_path in DeepSpeed Config cannot be None".
        text = "is not set, and parallel.offload is 'nvme'; set it to a folder on a local disk of every node"
        yield Problem("parallel.nvme_path", text, ("parallel.offload",))
    if parallel.offload != "nvme" and parallel.nvme_path is not None:
        text = f"{shown(parallel.nvme_path)} would be ignored, since parallel.offload is '{parallel.offload}'; set parallel.offload=nvme"
        yield Problem("parallel.nvme_path", text, ("parallel.offload",))


def _hybrid(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    # zero_hpz_partition_size is read by ZeRO-3 only; accelerate makes a mesh of copies and shards for FSDP2 only.
    if parallel.hybrid_shard and parallel.plan not in ("auto", "zero3", "fsdp2"):
        text = (
            f"is not possible with plan {parallel.plan}, which shards no parameters; set parallel.plan=zero3 or fsdp2"
        )
        yield Problem("parallel.hybrid_shard", text, ("parallel.plan",))


def _shared_rows(config: Config) -> Iterator[Problem]:
    parallel, extra = config.parallel, config.train.extra
    size, field = parallel.sequence_parallel_size, "parallel.sequence_parallel_size"
    if size == 1:
        return
    # accelerate/accelerator.py reads sp_size in _prepare_deepspeed only; its guide says tested with stages 2 and 3.
    if parallel.plan not in ("auto", *ZERO):
        text = f"{size} is not possible with plan {parallel.plan}; set parallel.plan=zero3, or sequence_parallel_size=1"
        yield Problem(field, text, ("parallel.plan",))
    # deepspeed/runtime/sequence_parallel/parallel_state_sp.py, initialize_sequence_parallel; groups stay inside a node.
    count = parallel.num_processes
    if count != "auto" and count % size:
        divisors = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
        text = f"{size} does not divide parallel.num_processes {count}; use one of {divisors}"
        yield Problem(field, text, ("parallel.num_processes",))
    # accelerate, DeepSpeedSequenceParallelConfig.__post_init__.
    attention = config.model.attn_implementation
    hub_kernel = "/" in attention and "flash-attn" in attention
    if attention not in ("auto", "sdpa", "flash_attention_2", "flash_attention_3") and not hub_kernel:
        text = f"{shown(attention)} cannot share rows between GPUs; use sdpa or flash_attention_2, or {field}=1"
        yield Problem("model.attn_implementation", text, (field,))
    # trl/trainer/sft_trainer.py: refused by SFTTrainer, since each process sees part of a row's loss.
    for name, plain in (("label_smoothing_factor", 0), ("loss_type", "nll")):
        if extra.get(name, plain) != plain:
            text = f"{shown(extra[name])} is not possible with {field} {size}; take it out, or set {field}=1"
            yield Problem(f"train.extra.{name}", text, (field,))
    # deepspeed, UlyssesSPDataLoaderAdapter.refill: "batch's seqlen isn't divisible by sp-size". Rows are padded to
    # data.max_length (train/arguments.py), since it gathers them from the processes of a group.
    if config.data.max_length % size:
        length = -(-config.data.max_length // size) * size
        text = f"{config.data.max_length} is not a multiple of {field} {size}; use {length}"
        yield Problem("data.max_length", text, (field,))
    if "pad_to_multiple_of" in extra:
        text = f"would be ignored: rows that are shared are padded to data.max_length; take it out, or set {field}=1"
        yield Problem("train.extra.pad_to_multiple_of", text, (field,))


def _lora(config: Config) -> Iterator[Problem]:
    lora, parallel, train = config.model.lora, config.parallel, config.train
    if lora is None:
        return
    # trl/trainer/sft_trainer.py: "Applying a PEFT adapter to `lm_head` is not supported".
    if "lm_head" in lora.target_modules:
        text = "holds 'lm_head', whose adapter would never be trained; put it into model.lora.modules_to_save instead"
        yield Problem("model.lora.target_modules", text)
    # accelerate/utils/fsdp_utils.py, fsdp2_apply_ac: checkpoint_wrapper(preserve_rng_state=False). The recomputed layer
    # drops other values than the first pass did; tests/cpu/test_library_limits.py shows it.
    if parallel.plan == "fsdp2" and lora.lora_dropout > 0 and train.gradient_checkpointing is not False:
        text = (
            f"{lora.lora_dropout:g} gives wrong gradients with plan fsdp2 and gradient checkpointing, since FSDP recomputes "
            "with another random state; set it to 0, train.gradient_checkpointing=false or parallel.plan=zero3"
        )
        yield Problem("model.lora.lora_dropout", text, ("parallel.plan", "train.gradient_checkpointing"))


def _quantization(config: Config) -> Iterator[Problem]:
    lora, plan = config.model.lora, config.parallel.plan
    if lora is None or lora.quantization == "none":
        return
    # transformers/modeling_utils.py, get_init_context: no zero.Init for a quantized model, so each process loads it whole
    # (peft#2016, DeepSpeed#5637). accelerate/utils/fsdp_utils.py, fsdp2_prepare_model: 4-bit weights are left out of
    # sharding, or, stored as bfloat16, fail (accelerate#3874, open).
    if plan in ("zero3", "fsdp2"):
        text = (
            f"'{lora.quantization}' is not possible with plan {plan}, which cannot shard 4-bit weights while it loads them; "
            "set parallel.plan=ddp or zero2 (they take half a byte a parameter on each GPU), or quantization=none"
        )
        yield Problem("model.lora.quantization", text, ("parallel.plan",))


def _recomputing(config: Config) -> Iterator[Problem]:
    """Fields about recomputing activations that the plan overrides or cannot do."""
    plan = config.parallel.plan
    for name in RECOMPUTING:
        value = config.train.extra.get(name)
        field = f"train.extra.{name}"
        if not isinstance(value, dict) or not value:
            continue
        if plan == "fsdp2":
            # FSDP's own recomputing is used (fsdp_config.activation_checkpointing), which takes no such arguments.
            yield Problem(field, "would be ignored with plan fsdp2; take it out", ("parallel.plan",))
        elif plan == "zero3" and config.model.lora is not None:
            # trl/trainer/sft_trainer.py: PEFT with ZeRO-3 needs use_reentrant=True (trl#2514, DeepSpeed#8130), and selective
            # recomputing needs the opposite.
            text = "is not possible with LoRA and plan zero3, which need use_reentrant: true; take it out, or set parallel.plan=zero2"
            for wrong in (key for key, bad in (("use_reentrant", False), ("selective", True)) if value.get(key) is bad):
                yield Problem(field, f"{wrong}: {shown(value[wrong])} {text}", ("parallel.plan", "model.lora"))


def _ddp_only(config: Config) -> Iterator[Problem]:
    plan = config.parallel.plan
    for name in OF_DDP:
        if plan not in ("auto", "ddp") and name in config.train.extra:
            yield Problem(f"train.extra.{name}", f"would be ignored with plan {plan}; take it out", ("parallel.plan",))


def _skipping(config: Config) -> Iterator[Problem]:
    plan = config.parallel.plan
    # deepspeed/runtime/zero/stage_1_and_2.py, step(): in bfloat16 only bf16.check_grad_overflow leaves a step out, and that
    # has the host wait for the GPU in every step; stage3.py always looks.
    if config.train.nonfinite == "skip" and plan in ("zero1", "zero2") and config.model.dtype != "float32":
        text = f"'skip' is not possible with plan {plan}, whose optimizer takes every step in bfloat16; set parallel.plan=zero3, fsdp2 or ddp"
        yield Problem("train.nonfinite", text, ("parallel.plan",))
