"""Which sizes of sequence_parallel_size a model's heads allow, and where a config that asks for another is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.batch import check_heads, heads_of, largest_below, sizes
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.resolve import resolve

NODE = Machine("x", 64, True, 512.0, (Gpu("NVIDIA H100", 80.0, 9.0),) * 8)


def shared(size: int, name: str = "embedded:tiny") -> Config:
    parallel = {"plan": "zero3", "sequence_parallel_size": size}
    return Config.model_validate({"model": {"name": name}, "parallel": parallel, "train": {"global_batch_size": 8}})


@pytest.mark.parametrize(
    ("heads", "kv_heads", "possible"),
    [
        (16, 8, [1, 2, 4, 8, 16]),  # 16: each key/value head goes to two processes
        (28, 4, [1, 2, 4, 28]),
        (9, 3, [1, 3, 9]),
        (12, 8, [1, 2, 4]),
        (8, 1, [1, 2, 4, 8]),
    ],
)
def test_sizes(heads: int, kv_heads: int, possible: list[int]) -> None:
    assert sizes(heads, kv_heads) == possible
    assert [largest_below(heads, kv_heads, size) for size in (1, 3)] == [1, max(s for s in possible if s <= 3)]


def test_a_config_whose_rows_cannot_be_shared_is_refused_before_anything_starts() -> None:
    with pytest.raises(
        ConfigError, match="is 8, but embedded:tiny has 4 attention heads and 2 key/value heads"
    ) as refused:
        resolve(shared(8), NODE)
    assert refused.value.hint == "set parallel.sequence_parallel_size=4; with this model 1, 2, 4 can be"
    assert resolve(shared(4), NODE).layout.sequence_parallel_size == 4


def test_heads_of_a_kind_of_model_that_the_planner_cannot_count(tmp_path: Path) -> None:
    def written(**tree: Any) -> Config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", **tree}))
        return shared(4, str(tmp_path))

    wanted = written(num_attention_heads=6)
    assert heads_of(wanted.model) == (6, 6)
    with pytest.raises(ConfigError, match="has 6 attention heads:"):
        resolve(wanted, NODE)
    assert heads_of(written(text_config={"num_attention_heads": 8, "num_key_value_heads": 2}).model) == (8, 2)
    check_heads(written())
    check_heads(shared(4, "someone/not-here-yet"))


def test_the_commands_say_so(run_cli: Any, ask_cli: Any) -> None:
    sizes = (
        "model.name=embedded:tiny",
        "parallel.plan=zero3",
        "parallel.num_processes=8",
        "parallel.sequence_parallel_size=8",
    )
    shown = ask_cli("config", "smoke", *sizes)
    assert "# here: this machine cannot run it: parallel.sequence_parallel_size is 8, but" in shown.stdout
    assert "# here: set parallel.sequence_parallel_size=4" in shown.stdout
    planned = ask_cli("plan", "smoke", *sizes, "--gpus", "8", "--gpu", "h100")
    assert "cannot deal out 4 attention heads and 2 key/value heads" in planned.stdout
    trained = run_cli("train", "smoke", *sizes)
    assert trained.returncode == 2
    assert "has 4 attention heads and 2 key/value heads" in trained.stderr
