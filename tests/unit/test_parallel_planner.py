"""Which plan is chosen, that the global batch is kept, what is advised, and what `sft-dist plan` prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sft_dist.config.loader import list_recipes, load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.parallel.advice import advice
from sft_dist.parallel.compiling import counted_as_compiled
from sft_dist.parallel.estimate import Cluster, Estimate, job_of
from sft_dist.parallel.hardware import GPUS
from sft_dist.parallel.planner import allowed, best, choose, plan_all
from sft_dist.parallel.plans import PLANS, Layout
from sft_dist.parallel.predicted import compare, predicted
from sft_dist.parallel.table import planner_table
from sft_dist.parallel.workload import Rows, rows_of, steps_of

H100 = GPUS["h100"]
ONE, EIGHT, TWO_NODES = Cluster(H100, 1), Cluster(H100, 8), Cluster(H100, 8, 2)
LARGE = "Qwen/Qwen3-8B"


def config(name: str = LARGE, **sections: Any) -> Config:
    sections = {"data": {"max_length": 4096}, "train": {"global_batch_size": 64}, **sections}
    return Config.model_validate({"model": {"name": name}, **sections})


def estimates(wanted: Config, cluster: Cluster) -> list[Estimate]:
    return plan_all(job_of(wanted), cluster)


@pytest.mark.parametrize(
    ("name", "cluster", "plans"),
    [
        ("Qwen/Qwen3-0.6B", ONE, {"single"}),
        ("Qwen/Qwen3-0.6B", EIGHT, {"ddp"}),
        (LARGE, EIGHT, {"zero1", "zero2", "zero3", "fsdp2"}),
        (LARGE, TWO_NODES, {"zero1", "zero2", "zero3", "fsdp2"}),
        ("Qwen/Qwen3-32B", TWO_NODES, {"zero2", "zero3", "fsdp2"}),
    ],
)
def test_the_choice(name: str, cluster: Cluster, plans: set[str]) -> None:
    found = choose(config(name), cluster.gpus_per_node, cluster.gpu, cluster.nodes)
    assert found.plan in plans
    assert found.fits
    assert f"parallel.plan = {found.plan}" in found.lines[0]
    assert "GiB usable" in found.lines[-1]


@pytest.mark.parametrize("total", [8, 16, 24, 48, 64, 120, 256])
@pytest.mark.parametrize("length", [256, 2048, 8192])
def test_the_global_batch_is_kept_exactly(total: int, length: int) -> None:
    wanted = config("Qwen/Qwen3-1.7B", data={"max_length": length}, train={"global_batch_size": total})
    for found in estimates(wanted, EIGHT):
        assert found.batch.rows * found.batch.accumulation * found.layout.data_parallel_size == total
    chosen = choose(wanted, 8, H100)
    assert chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps * 8 == total


def test_what_the_config_sets_is_kept() -> None:
    wanted = config(
        parallel={"plan": "fsdp2"},
        train={"global_batch_size": 64, "per_device_train_batch_size": 2, "gradient_checkpointing": True},
    )
    found = choose(wanted, 8, H100)
    assert (found.plan, found.per_device_train_batch_size, found.gradient_accumulation_steps) == ("fsdp2", 2, 4)
    assert found.gradient_checkpointing is True
    assert len(found.lines) == 1, "only memory is left to tell"


def test_offload_is_taken_where_it_is_asked_for() -> None:
    found = choose(config(parallel={"offload": "cpu"}), 1, H100)
    assert found.estimate.layout.offload == "cpu"
    assert found.fits


def test_hybrid_sharding_leaves_the_plans_that_can_do_it() -> None:
    found = choose(config(parallel={"hybrid_shard": True}), 8, H100, 2)
    assert found.plan in ("zero3", "fsdp2")
    assert found.estimate.layout.hybrid_shard


def test_shared_rows_are_deepspeeds() -> None:
    wanted = config(data={"max_length": 131_072}, parallel={"sequence_parallel_size": 8})
    found = choose(wanted, 8, H100)
    assert found.plan.startswith("zero")
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 64


def test_shared_rows_need_heads_that_can_be_dealt_out() -> None:
    wanted = config("Qwen/Qwen2.5-7B", parallel={"sequence_parallel_size": 8})
    with pytest.raises(ConfigError, match="no plan can run") as refused:
        choose(wanted, 8, H100)
    why = "sequence_parallel_size 8 cannot deal out 28 attention heads and 4 key/value heads, only 1, 2, 4, 28 can"
    assert all(why in problem for problem in refused.value.problems)
    assert refused.value.hint == "set parallel.sequence_parallel_size=4"
    assert advice(job_of(wanted), EIGHT) == ["set parallel.sequence_parallel_size=4"]
    assert choose(config("Qwen/Qwen2.5-7B", parallel={"sequence_parallel_size": 4}), 8, H100).fits


def test_four_bit_weights_are_not_sharded() -> None:
    lora = {"name": LARGE, "lora": {"quantization": "nf4"}}
    found = choose(config(model=lora), 8, H100)
    assert found.plan in ("ddp", "zero1", "zero2")


def test_an_old_gpu_computes_in_float32() -> None:
    found = choose(config("Qwen/Qwen3-0.6B", data={"max_length": 512}), 1, GPUS["v100"])
    assert found.estimate.layout.dtype == "float32"
    assert choose(config("Qwen/Qwen3-0.6B"), 1, H100, dtype="float32").estimate.layout.dtype == "float32"


def test_known_rows_allow_larger_micro_batches() -> None:
    wanted = config(data={"max_length": 8192})
    assert (
        choose(wanted, 8, H100, longest=512, mean=200).per_device_train_batch_size
        > choose(wanted, 8, H100).per_device_train_batch_size
    )


def test_what_does_not_fit_is_still_answered() -> None:
    found = choose(config("meta-llama/Llama-3.1-70B"), 1, H100)
    assert not found.fits
    assert "is more than" in found.lines[-1]


def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="60 does not divide by 8 GPUs") as refused:
        choose(config(train={"global_batch_size": 60}), 8, H100)
    assert "56 or 64" in (refused.value.hint or "")


def test_one_gpu_of_several_is_taken_only_where_the_config_says_so() -> None:
    small = "Qwen/Qwen3-0.6B"
    assert choose(config(small), 8, H100).plan == "ddp"
    asked = choose(config(small, parallel={"plan": "single"}), 8, H100)
    assert (asked.plan, asked.estimate.layout.world_size) == ("single", 1)


def test_the_best_is_the_fastest_that_fits_or_hardly_slower() -> None:
    found = estimates(config(), EIGHT)
    chosen = best(found)
    assert chosen is not None
    rivals = [other.time.seconds for other in found if other.comfortable]
    assert chosen.time.seconds <= min(rivals) * 1.03 + 1e-9
    assert best([other for other in found if not other.fits]) is None


def test_advice_where_nothing_fits() -> None:
    job = job_of(config())
    assert best(allowed(job, ONE, plan_all(job, ONE))) is None
    lines = advice(job, ONE)
    text = "\n".join(lines)
    for change in ("parallel.offload=cpu", "model.lora={}", "quantization: nf4", "GPUs (--gpus 2 --nodes 1)"):
        assert change in text
    assert advice(job, EIGHT) == []


def test_advice_on_what_the_config_sets() -> None:
    train = {"global_batch_size": 64, "gradient_checkpointing": False, "per_device_train_batch_size": 8}
    text = "\n".join(advice(job_of(config(train=train)), EIGHT))
    assert "train.per_device_train_batch_size=auto" in text
    fixed = config(parallel={"plan": "ddp"}, train={"global_batch_size": 64, "gradient_checkpointing": True})
    assert "parallel.plan=auto" in "\n".join(advice(job_of(fixed), EIGHT))


def test_shorter_rows_are_advised_where_they_help() -> None:
    long = config("Qwen/Qwen3-4B", data={"max_length": 65_536}, train={"global_batch_size": 8})
    assert any(line.startswith("data.max_length=") for line in advice(job_of(long), ONE))


# --- rows and steps ---------------------------------------------------------------------------------------------------


def test_rows_of_a_task_less_those_held_out() -> None:
    wanted = config(data={"train": {"task": "mix", "rows": 200, "sample": 150}, "eval_size": 0.1, "max_length": 512})
    assert (rows_of(wanted).count, rows_of(wanted).longest) == (135, 512)
    assert steps_of(wanted, 135) == 3
    assert steps_of(config(train={"global_batch_size": 8, "num_train_epochs": 2.5}), 135) == 43
    assert steps_of(config(train={"max_steps": 7}), None) == 7
    assert steps_of(wanted, None) is None


def test_rows_of_a_file_are_counted_by_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 41 + "{}")
    assert rows_of(config(data={"train": {"path": str(path)}})).count == 42
    unknown = rows_of(config(data={"train": {"path": "someone/dataset"}}))
    assert unknown.count is None
    assert "unknown" in unknown.origin


def test_the_ledger_of_an_earlier_run_tells_how_long_rows_are(tmp_path: Path) -> None:
    wanted = config(run={"name": "mine", "dir": str(tmp_path)})
    ledger = tmp_path / "mine" / "data" / "ledger.json"
    ledger.parent.mkdir(parents=True)
    ledger.write_text(json.dumps({"train": {"rows": 1000, "tokens": 300_000, "longest_row": 1500}}))
    found = rows_of(wanted)
    assert (found.count, found.longest, found.mean) == (1000, 1500, 300)
    assert (found.trained, found.spread, found.weighted_mean) == (1.0, 0.0, 300)
    counts = {"rows": 1000, "tokens": 300_000, "longest_row": 1500, "trained_tokens": 150_000, "spread": 150.0}
    ledger.write_text(json.dumps({"train": counts}))
    found = rows_of(wanted)
    assert (found.trained, found.weighted_mean) == (0.5, 375)
    ledger.write_text("{")
    assert rows_of(wanted).longest == 4096


def test_the_fullest_micro_batch_to_be_expected() -> None:
    """The rows of benchmarks/plans.py, 32 a micro batch: 28,784 tokens in the fullest of 28, and 7.9 % waiting of two."""
    rows = Rows(3992, 2048, 649.5, "", spread=521)
    assert rows.fullest(32, 28) == pytest.approx(28_784, rel=0.1)
    assert rows.fullest(32, 2) / (32 * rows.mean) == pytest.approx(1.079, abs=0.01)
    assert rows.fullest(32, 1) == pytest.approx(32 * rows.mean)
    assert rows.fullest(1, 10**9) == 2048, "not more than the longest rows"
    assert Rows(None, 512, 512.0, "").fullest(4, 1000) == 2048


@pytest.mark.parametrize(
    ("train", "plan", "expected"),
    [
        ({}, "ddp", True),
        ({"max_steps": 99}, "ddp", False),
        ({"max_steps": 100}, "fsdp2", True),
        ({"max_steps": 99, "compile_layers": True}, "ddp", True),
        ({"compile_layers": False}, "zero2", False),
        ({"compile_layers": True}, "zero3", True),
    ],
)
def test_layers_are_counted_as_the_config_compiles_them(train: dict[str, Any], plan: str, expected: bool) -> None:
    wanted = config(train={"global_batch_size": 64, **train})
    found = [found.layout for found in estimates(wanted, EIGHT) if found.name == plan]
    assert {layout.compile_layers for layout in found} == {expected}
    assert not counted_as_compiled(wanted, "float32") or "compile_layers" in train


# --- after a run ------------------------------------------------------------------------------------------------------


def test_predicted_against_measured() -> None:
    layout = Layout(PLANS["zero2"], processes_per_node=8)
    said = predicted(config(), layout, H100, 1, longest=1000, mean=400)
    assert json.loads(json.dumps(said)) == said
    measured = {"peak_memory_gib": said["peak_memory_gib"] * 1.25, "tokens_per_s_per_gpu": 1000, "mfu": None}
    rows = compare(said, measured)
    assert [row["what"] for row in rows] == ["GPU memory", "tokens/s/GPU"]
    assert rows[0]["off"] == pytest.approx(-0.2, abs=1e-3)
    assert compare(said, {}) == []
    compiled = predicted(config(), dataclasses.replace(layout, compile_layers=True), H100, 1, longest=1000, mean=400)
    assert compiled["tokens_per_s_per_gpu"] > said["tokens_per_s_per_gpu"]
    spread = predicted(config(), layout, H100, 8, longest=4000, mean=400, spread=300, count=1000)
    assert spread["peak_memory_gib"] < spread["estimate"]["gpu_gib"]["allocated"]


# --- the command ------------------------------------------------------------------------------------------------------

NUMBER, TEXT = {"type": "number", "minimum": 0}, {"type": "string"}
OUTPUT = {
    "type": "object",
    "required": ["model", "cluster", "rows", "estimates", "chosen", "arithmetic", "advice", "disk", "files"],
    "properties": {
        "model": {"type": "object", "required": ["name", "origin", "parameters", "matmul_parameters"]},
        "cluster": {"type": "object", "required": ["gpu", "gpus_per_node", "nodes", "memory_gib"]},
        "chosen": {"type": ["integer", "null"]},
        "arithmetic": {"type": "array", "items": TEXT},
        "advice": {"type": "array", "items": TEXT},
        "files": {"type": "array", "items": TEXT},
        "estimates": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["plan", "fits", "gpu_gib", "seconds", "checkpoint_gib", "host_gib_per_node"],
                "properties": {
                    "plan": {"enum": ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]},
                    "offload": {"enum": ["none", "cpu", "nvme"]},
                    "gradient_checkpointing": {"type": "boolean"},
                    "compile_layers": {"type": "boolean"},
                    "dtype": {"enum": ["float32", "bfloat16"]},
                    "fits": {"type": "boolean"},
                    "refused": {"type": ["string", "null"]},
                    "gpu_gib": {"type": "object", "additionalProperties": NUMBER},
                    "seconds": {"type": "object", "additionalProperties": NUMBER},
                    "sent_gb_per_step": {"type": "object", "additionalProperties": NUMBER},
                    "steps": {"type": ["integer", "null"]},
                    "total_seconds": {"type": ["number", "null"]},
                    **{
                        name: {"type": "integer", "minimum": 0}
                        for name in (
                            "nodes",
                            "processes_per_node",
                            "per_device_train_batch_size",
                            "gradient_accumulation_steps",
                            "tokens_at_once",
                            "tokens_per_step",
                            "tokens_per_s_per_gpu",
                        )
                    },
                    **dict.fromkeys(("host_gib_per_node", "checkpoint_gib", "disk_gib", "mfu"), NUMBER),
                },
            },
        },
    },
}


def test_the_command_as_data(ask_cli: Any) -> None:
    done = ask_cli("plan", "qwen3-8b-zero3", "--gpus", "8", "--gpu", "h100", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    jsonschema.validate(told, OUTPUT)
    chosen = told["estimates"][told["chosen"]]
    assert (chosen["plan"], chosen["fits"]) == ("zero3", True)


def test_the_command_in_words(run_cli: Any, ask_cli: Any) -> None:
    done = run_cli("plan", "qwen3-8b-lora", "--gpus", "2", "--gpu", "h100", "--nodes", "2")
    assert done.returncode == 0, done.stderr
    marked = [line for line in done.stdout.splitlines() if line.strip().startswith(">")]
    assert len(marked) == 1
    for words in (
        "8,190,735,360 parameters",
        "LoRA of rank 16",
        "2 nodes with 2 x h100",
        "GiB usable",
        "disk:",
        "files:",
    ):
        assert words in done.stdout
    narrow = ask_cli("plan", "demo", "--gpu", "h100", env={"COLUMNS": "80"})
    assert narrow.stdout.count("recompute") == 2, "two tables instead of one"
    assert all(len(line) <= 80 for line in narrow.stdout.split("parallel.plan")[0].splitlines()[4:])


def test_the_files_are_named_where_a_run_writes_them(ask_cli: Any, tmp_path: Path) -> None:
    def files(*overrides: str, **env: str | None) -> list[str]:
        done = ask_cli("plan", "qwen3-8b-zero3", *overrides, "--gpus", "8", "--gpu", "h100", "--json", env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["files"]  # type: ignore[no-any-return]

    assert "runs/qwen3-8b-zero3/plan/deepspeed.json" in files(SFT_DIST_RUNS=None)
    assert "elsewhere/qwen3-8b-zero3/plan/deepspeed.json" in files(SFT_DIST_RUNS="elsewhere")
    assert f"{tmp_path}/eight/model/" in files(f"run.dir={tmp_path}", "run.name=eight")


def test_without_a_gpu_it_plans_for_one_and_says_so(ask_cli: Any) -> None:
    done = ask_cli("plan", "demo", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "no GPU is visible here: planned for h100" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("demo", "--gpu", "h10"), 2, "did you mean h100?"),
        (("demo", "model.name=Qwen/Qwen3-80B"), 3, "knows no config.json"),
        (("demo", "--gpus", "0"), 2, "gpus"),
    ],
)
def test_mistakes(ask_cli: Any, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = ask_cli("plan", *arguments)
    assert done.returncode == status
    assert words in done.stderr


def test_every_recipe_can_be_planned_without_network() -> None:
    for name in list_recipes():
        job = job_of(load_config(name).config)
        cluster = TWO_NODES if name.endswith("2nodes") else EIGHT
        assert best(plan_all(job, cluster)) is not None, name


def test_an_unknown_model_is_no_surprise_to_choose() -> None:
    with pytest.raises(PreflightError):
        choose(config("someone/unknown"), 1, H100)


def test_the_page_holds_every_model_and_size() -> None:
    page = planner_table()
    for name in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Meta-Llama-3-8B"):
        assert (
            sum(line.startswith("| ") and f"{name} | " in line and line.count("|") == 10 for line in page.splitlines())
            == 5
        )
    assert "{" not in page
    assert page == planner_table()
