"""Every plan trains as one process does: the same losses, gradients, weights and tokens, and an export of the same shape.

Float32 runs agree to the last bits: what is left is the order in which gradients are summed, over micro batches and
processes. Tolerances stand at about five times what was measured (Zen 5, torch 2.13, gloo).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.files import read_json, read_jsonl, write_jsonl
from sft_dist.parallel.machine import this_machine
from sft_dist.rundir import RunDir

TinyRun = Callable[..., RunDir]
Launch = Callable[..., str]

STEPS, FIRST = 20, 8
LAYERS = 2
PLANS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
COMMON = (f"train.max_steps={STEPS}", "train.global_batch_size=8")
# name -> plan, rows of a micro batch, activation checkpointing. Eight rows a step, four for each of two processes.
FLOAT32 = {
    **{f"{plan}-1x4-checkpointing": (plan, 1, True) for plan in PLANS},
    **{f"{plan}-4x1": (plan, 4, False) for plan in PLANS},
}
BFLOAT16 = {f"{plan}-bfloat16": (plan, 2, False) for plan in PLANS}
PADDED = {f"{plan}-padded": (plan, 2, False) for plan in ("ddp", "zero3")}
# Stopped after their first steps.
FOUR = ("ddp-of-4", "fsdp2-of-4")
# Ten rows at eight a step: the last step of each of two epochs is short.
UNEVEN = {"uneven-ddp": ("ddp", 4), "uneven-zero3": ("zero3", 2), "uneven-fsdp2": ("fsdp2", 1)}
TEN_ROWS = ("data.train={task: mix, rows: 10, seed: 1}", "train.num_train_epochs=2", "train.max_steps=null")
# The same with answers of different weights, as many rows.
WEIGHTED = {"weighted-ddp": ("ddp", 1), "weighted-zero3": ("zero3", 2), "weighted-fsdp2": ("fsdp2", 1)}
# On two nodes of two processes: shards inside a node, copies across.
HYBRID = ("zero3-hybrid", "fsdp2-hybrid")
# Two processes share each row; each in a world of its own, since DeepSpeed replaces the attention of all later models.
SHARED = ("zero1-shared", "zero3-shared")
SHARE = "parallel.sequence_parallel_size=2"

LOSS = 1e-6
GRADIENT_NORM = 4e-6
WEIGHTS = 6e-5
# A count of tokens that was rounded to bfloat16 is off by up to 4e-3, and so is the loss then.
LOSS_BFLOAT16 = 6e-4
GRADIENT_NORM_BFLOAT16 = 4e-2
WEIGHTS_BFLOAT16 = 4e-2


def settings(plan: str, micro: int, checkpointing: bool) -> tuple[str, ...]:
    return (
        f"parallel.plan={plan}",
        f"train.per_device_train_batch_size={micro}",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
    )


def weighted_rows(path: Path) -> Path:
    """A file of ten conversations, the answers of which weigh from 0.05 to 2."""
    weights = [(0.05 + 0.2 * (n % 4), (0.3, 1, 2)[n % 3]) for n in range(10)]
    said = [("user", "One?", None), ("assistant", "first", 0), ("user", "Two?", None), ("assistant", "second", 1)]
    rows = [
        [
            {"role": role, "content": f"{text} {n}", "weight": None if at is None else pair[at]}
            for role, text, at in said
        ]
        for n, pair in enumerate(weights)
    ]
    write_jsonl(path, [{"messages": messages} for messages in rows])
    return path


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Every run of this file by its name, trained; `one` and `one-bfloat16` by one process, whole batches at once."""
    folder = tmp_path_factory.mktemp("equivalence")

    def make(name: str, *overrides: str) -> RunDir:
        return tiny_run(folder, name, *COMMON, *overrides)

    one = {"one": make("one", "train.per_device_train_batch_size=8")}
    ten = (f"data.train={weighted_rows(folder / 'weighted.jsonl')}", *TEN_ROWS[1:])
    one["weighted"] = make("weighted", "train.per_device_train_batch_size=8", *ten)
    one["uneven"] = make("uneven", "train.per_device_train_batch_size=2", *TEN_ROWS)
    two = {name: make(name, *settings(*arm)) for name, arm in FLOAT32.items()}
    two |= {name: make(name, *settings(plan, micro, False), *TEN_ROWS) for name, (plan, micro) in UNEVEN.items()}
    two |= {name: make(name, *settings(plan, micro, False), *ten) for name, (plan, micro) in WEIGHTED.items()}
    two |= {name: make(name, *settings(*arm), "model.attn_implementation=sdpa") for name, arm in PADDED.items()}
    if this_machine().cpu_bf16:
        half = ("model.dtype=bfloat16", f"train.max_steps={FIRST}")
        one["one-bfloat16"] = make("one-bfloat16", "train.per_device_train_batch_size=8", *half)
        two |= {name: make(name, *settings(*arm), *half) for name, arm in BFLOAT16.items()}
    four = {name: make(name, *settings(name.split("-")[0], 1, False)) for name in FOUR}
    hybrid = {
        name: make(name, *settings(name.split("-")[0], 1, False), "parallel.hybrid_shard=true") for name in HYBRID
    }
    shared = {"uneven-shared": make("uneven-shared", *settings("zero2", 2, False), *TEN_ROWS, SHARE)}
    shared |= {
        name: make(name, *settings(name.split("-")[0], 4, False), "parallel.sequence_parallel_size=2")
        for name in SHARED
    }
    launch(
        {
            1: [run.path for run in one.values()],
            2: [run.path for run in two.values()],
            4: [f"{run.path}@{FIRST}:3" for run in four.values()],
            "2x2": [f"{run.path}@{FIRST}:3" for run in hybrid.values()],
            "1x2": [f"{shared[SHARED[0]].path}@{FIRST}:1"],
            "01x2": [f"{shared[SHARED[1]].path}@{FIRST}:1"],
            "001x2": [shared["uneven-shared"].path],
        }
    )
    return {**one, **two, **four, **hybrid, **shared}


def column(run: RunDir, name: str) -> list[float]:
    return [row[name] for row in read_jsonl(run.metrics) if "loss" in row]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def furthest(found: Iterable[float], wanted: Iterable[float]) -> float:
    """The largest relative difference of two columns."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative distance (L2 norm) of a weight."""
    return max(float((found[name].double() - it.double()).norm() / it.double().norm()) for name, it in wanted.items())


# --- what the comparison rests on ------------------------------------------------------------------------------------


def test_the_comparison_would_see_a_wrong_weight_of_the_rows(runs: dict[str, RunDir]) -> None:
    """Rows differ so much in their trained tokens that a mean over processes' means would be another loss."""
    from datasets import load_from_disk

    from sft_dist.train.pretrained import cache_root

    key = read_json(runs["one"].ledger)["key"]
    (folder,) = (path for path in cache_root().rglob(f"*{key}*") if path.is_dir())
    trained = [sum(label != -100 for label in labels) for labels in load_from_disk(str(folder / "train"))["labels"]]
    assert max(trained) >= 4 * min(trained)


def test_the_training_is_worth_comparing(runs: dict[str, RunDir], tiny_model_dir: Path) -> None:
    losses = column(runs["one"], "loss")
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    assert distance(weights(runs["one"]), load_file(tiny_model_dir / "model.safetensors")) > 1000 * WEIGHTS


@pytest.mark.parametrize("name", [*FLOAT32, *PADDED])
def test_each_run_was_what_its_name_says(runs: dict[str, RunDir], name: str) -> None:
    plan, micro, checkpointing = {**FLOAT32, **PADDED}[name]
    resolved = read_json(runs[name].path / "env.json")["resolved"]
    assert (resolved["plan"], resolved["world_size"]) == (plan, 2)
    assert (resolved["per_device_train_batch_size"], resolved["gradient_accumulation_steps"]) == (micro, 4 // micro)
    assert resolved["attn_implementation"] == ("sdpa" if name in PADDED else "sft_dist_varlen")
    micro_batches = STEPS * 4 // micro
    # With checkpointing a layer computes its forward pass a second time in the backward pass.
    assert read_json(runs[name].path / "forwards.json") == micro_batches * LAYERS * (2 if checkpointing else 1)


# --- the same training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLOAT32, *PADDED])
def test_losses_and_gradients_are_those_of_one_process(runs: dict[str, RunDir], name: str) -> None:
    assert furthest(column(runs[name], "loss"), column(runs["one"], "loss")) < LOSS
    assert furthest(column(runs[name], "grad_norm"), column(runs["one"], "grad_norm")) < GRADIENT_NORM


@pytest.mark.parametrize("name", [*FLOAT32, *PADDED])
def test_the_final_weights_are_those_of_one_process(runs: dict[str, RunDir], name: str) -> None:
    assert distance(weights(runs[name]), weights(runs["one"])) < WEIGHTS


@pytest.mark.parametrize("name", [*FLOAT32, *PADDED])
def test_tokens_are_those_of_all_processes(runs: dict[str, RunDir], name: str) -> None:
    assert column(runs[name], "tokens") == column(runs["one"], "tokens")
    assert column(runs[name], "tokens")[-1] == read_json(runs["one"].ledger)["train"]["tokens"], "20 x 8 rows are all"
    assert column(runs[name], "mean_token_accuracy") == column(runs["one"], "mean_token_accuracy")


@pytest.mark.parametrize("name", [*UNEVEN, "uneven-shared"])
def test_a_short_last_step_is_as_short_in_every_plan(runs: dict[str, RunDir], name: str) -> None:
    assert len(column(runs[name], "loss")) == 4, "8 and 2 rows, twice"
    assert furthest(column(runs[name], "loss"), column(runs["uneven"], "loss")) < LOSS
    assert furthest(column(runs[name], "grad_norm"), column(runs["uneven"], "grad_norm")) < GRADIENT_NORM
    rows = read_json(runs["uneven"].ledger)["train"]
    assert column(runs["uneven"], "tokens")[-1] == 2 * rows["tokens"]
    if name in UNEVEN:  # where rows are shared, those that fill the step are counted, a token each
        assert column(runs[name], "tokens") == column(runs["uneven"], "tokens")


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_count_the_same_in_every_plan(runs: dict[str, RunDir], name: str) -> None:
    ledger = read_json(runs["weighted"].ledger)["train"]
    assert ledger["weighted_rows"] == 10 and ledger["trained_weight"] < 0.8 * ledger["trained_tokens"]
    assert len(column(runs[name], "loss")) == 4
    assert furthest(column(runs[name], "loss"), column(runs["weighted"], "loss")) < LOSS
    assert furthest(column(runs[name], "grad_norm"), column(runs["weighted"], "grad_norm")) < GRADIENT_NORM


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_two_do(runs: dict[str, RunDir], name: str) -> None:
    assert read_json(runs[name].path / "env.json")["resolved"]["world_size"] == 4
    assert furthest(column(runs[name], "loss"), column(runs["one"], "loss")[:FIRST]) < LOSS
    assert column(runs[name], "tokens") == column(runs["one"], "tokens")[:FIRST]


@pytest.mark.parametrize("name", HYBRID)
def test_copies_across_nodes_of_shards_inside_them_train_as_one_process_does(
    runs: dict[str, RunDir], name: str
) -> None:
    resolved = read_json(runs[name].path / "env.json")["resolved"]
    assert (resolved["nodes"], resolved["processes_per_node"], resolved["hybrid_shard"]) == (2, 2, True)
    assert furthest(column(runs[name], "loss"), column(runs["one"], "loss")[:FIRST]) < LOSS
    assert furthest(column(runs[name], "grad_norm"), column(runs["one"], "grad_norm")[:FIRST]) < GRADIENT_NORM


@pytest.mark.parametrize("name", SHARED)
def test_processes_that_share_each_row_train_as_one_process_does(runs: dict[str, RunDir], name: str) -> None:
    resolved = read_json(runs[name].path / "env.json")["resolved"]
    assert (resolved["sequence_parallel_size"], resolved["gradient_accumulation_steps"]) == (2, 2), "8 rows, 4 at once"
    assert furthest(column(runs[name], "loss"), column(runs["one"], "loss")[:FIRST]) < LOSS
    assert furthest(column(runs[name], "grad_norm"), column(runs["one"], "grad_norm")[:FIRST]) < GRADIENT_NORM
    assert column(runs[name], "tokens") == column(runs["one"], "tokens")[:FIRST]


@pytest.mark.parametrize("name", BFLOAT16)
def test_in_bfloat16_each_plan_stays_near_one_process(runs: dict[str, RunDir], name: str) -> None:
    if name not in runs:
        pytest.skip("this CPU does not multiply bfloat16 in hardware")
    assert furthest(column(runs[name], "loss"), column(runs["one-bfloat16"], "loss")) < LOSS_BFLOAT16
    assert furthest(column(runs[name], "grad_norm"), column(runs["one-bfloat16"], "grad_norm")) < GRADIENT_NORM_BFLOAT16
    assert distance(weights(runs[name]), weights(runs["one-bfloat16"])) < WEIGHTS_BFLOAT16


# --- the exported model ----------------------------------------------------------------------------------------------


def shapes(run: RunDir) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights(run).items()}


@pytest.mark.parametrize("name", [*FLOAT32, *PADDED, *BFLOAT16])
def test_the_export_has_the_tensors_of_one_process(runs: dict[str, RunDir], name: str) -> None:
    if name not in runs:
        pytest.skip("this CPU does not multiply bfloat16 in hardware")
    assert shapes(runs[name]) == shapes(runs["one-bfloat16" if name in BFLOAT16 else "one"])
    assert "lm_head.weight" not in weights(runs[name]), "the head is the embedding: stored once"
    assert sorted(path.name for path in runs[name].model.iterdir()) == sorted(
        path.name for path in runs["one"].model.iterdir()
    )


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", ["4x1", "bfloat16"])
def test_the_export_loads_and_generates(runs: dict[str, RunDir], plan: str, shape: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if f"{plan}-{shape}" not in runs:
        pytest.skip("this CPU does not multiply bfloat16 in hardware")
    run, one = runs[f"{plan}-{shape}"], runs["one-bfloat16" if shape == "bfloat16" else "one"]
    model: Any = AutoModelForCausalLM.from_pretrained(run.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16 if shape == "bfloat16" else torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**question, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > question["input_ids"].shape[1]
    if shape == "4x1":
        other: Any = AutoModelForCausalLM.from_pretrained(one.model)
        assert torch.equal(answer, other.generate(**question, max_new_tokens=8, do_sample=False))
