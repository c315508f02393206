"""The section `slurm`: times, options, secrets, and cluster profiles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sft_dist.config.loader import load_config, load_run_config, write_config
from sft_dist.config.profile_example import profile_file
from sft_dist.config.resubmit import with_slurm
from sft_dist.config.rules_slurm import gpus_of, minutes
from sft_dist.config.schema_slurm import SlurmConfig
from sft_dist.config.yaml12 import parse_yaml
from sft_dist.errors import ConfigError
from sft_dist.jobs.resources import resolve_for_job


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (90, 90),
        ("90", 90),
        ("1:30", 2),
        ("1:30:00", 90),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("1-00:00:01", 1441),
        (None, 60),
    ],
)
def test_times(text: str | int | None, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["1h", "", "0", "1:2:3:4", "-5", "infinite"])
def test_what_is_no_time(text: str) -> None:
    assert minutes(text) is None


def test_gpus() -> None:
    assert gpus_of(SlurmConfig(gpus_per_node="h100:8")) == ("h100", 8)
    assert gpus_of(SlurmConfig(gpus_per_node=4, gpu="l40s")) == ("l40s", 4)
    assert gpus_of(SlurmConfig()) == (None, 0)


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:2", (None, 2)),
        ("gpu:h100:8", ("h100", 8)),
        ("nvme:1,gpu:a100:4(S:0-1)", ("a100", 4)),
        ("gpu", (None, 1)),
        ("gpu:l4", ("l4", 1)),
        ("gres/gpu:3", (None, 3)),
        ("nvme:100G", (None, 0)),
    ],
)
def test_gpus_that_gres_asks_for_count(gres: str, expected: tuple[str | None, int]) -> None:
    """The run was proven for the CPU, and its GPU hours were those of none."""
    assert gpus_of(SlurmConfig(extra={"gres": gres})) == expected
    assert gpus_of(SlurmConfig(gpus_per_node=0, extra={"gres": gres})) == (None, 0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("slurm.time=1h", "slurm.time   '1h' is not a time"),
        ("slurm.partitoin=gpu", "did you mean partition"),
        ("slurm.extra={mail-typ: END}", "did you mean mail-type"),
        ("slurm.extra={partition: x}", "is set by slurm.partition"),
        ("slurm.extra={output: x}", "is set by sft-dist"),
        ("slurm.extra={requeue: true}", "is set by slurm.max_requeues"),
        ("slurm.extra={comment: null}", "false to leave it out"),
        ("slurm.extra={comment: [1]}", "no value of an option"),
        ('slurm.account="a\\nb"', "line break"),
        ("slurm.env={HF_TOKEN: abc}", "looks like a secret"),
        ("slurm.setup=[export HF_TOKEN=hf_abc]", "looks like a secret"),
        ("slurm.setup=['A=1 wandb_api_key=\"0a\" true']", "looks like a secret"),
        ("slurm.extra={clusters: other}", "SLURM_CLUSTERS"),
        ("slurm.env={A-B: c}", "name of an environment variable"),
        ("slurm.gpus_per_node=many", "neither a number"),
        ("slurm.signal_delay_s=3600", "the run would stop as it starts"),
        ("slurm.profile=../x", "is not a name"),
        ("slurm.profile=nowhere", "there is no slurm/nowhere.yaml"),
    ],
)
def test_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("smoke", [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "slurm.env={TOKENIZERS_PARALLELISM: 'false'}",
        "slurm.setup=[export TOKENIZERS_PARALLELISM=false]",
        "slurm.setup=['export HF_TOKEN=$(cat ~/.token)', 'export HF_TOKEN=\"$OTHER\"', 'export HF_TOKEN=']",
    ],
)
def test_what_is_no_secret_is_let_through(override: str) -> None:
    slurm = load_config("smoke", [override]).config.slurm
    assert bool(slurm.env) != bool(slurm.setup), "it stands in the config"


def test_one_process_has_no_second_node() -> None:
    with pytest.raises(ConfigError, match=r"contradicts parallel\.plan cpu"):
        load_config("smoke", ["slurm.nodes=2", "parallel.plan=cpu"])


def test_a_profile_lies_below_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    home = tmp_path / "xdg" / "sft-dist" / "profiles"
    home.mkdir(parents=True)
    (home / "big.yaml").write_text("partition: gpu\naccount: me\nenv: {A: x}\n")
    loaded = load_config("smoke", ["slurm.profile=big", "slurm.account=you", "slurm.env.B=y"])
    slurm = loaded.config.slurm
    assert (slurm.partition, slurm.account, slurm.env) == ("gpu", "you", {"A": "x", "B": "y"})
    assert loaded.provenance["slurm.partition"] == f"file {home / 'big.yaml'}"
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "big.yaml").write_text("partition: here\n")
    assert load_config("smoke", ["slurm.profile=big"]).config.slurm.partition == "here"
    (tmp_path / "slurm" / "big.yaml").write_text("partition: here\nnode: 2\n")
    with pytest.raises(ConfigError, match="did you mean nodes"):
        load_config("smoke", ["slurm.profile=big"])
    (tmp_path / "slurm" / "big.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold fields"):
        load_config("smoke", ["slurm.profile=big"])


def test_a_run_changes_only_how_it_is_submitted(tmp_path: Path) -> None:
    config = load_config("smoke", ["slurm.env={A: x}"]).config
    changed = with_slurm(config, ["slurm.time=2:00:00"])
    assert (changed.slurm.time, changed.slurm.env, changed.train) == ("2:00:00", {"A": "x"}, config.train)
    (tmp_path / "config.yaml").write_text(write_config(changed))
    assert load_run_config(tmp_path) == changed
    again = with_slurm(changed, ["slurm.env.B=y", "slurm.extra.nice=3"])
    assert again.slurm.env == {"A": "x", "B": "y"}, "as in a config: one variable more, and the others stay"
    assert with_slurm(again, ["slurm.extra.hold=true"]).slurm.extra == {"nice": 3, "hold": True}
    with pytest.raises(ConfigError, match="train   cannot change"):
        with_slurm(config, ["train.max_steps=3"])


@pytest.mark.parametrize("whole", [False, True])
def test_the_profile_to_copy_can_be_used_as_it_is_and_with_every_field(whole: bool, tmp_path: Path) -> None:
    text = profile_file()
    if whole:
        text = re.sub(r"^#(?=\S|  )", "", text, flags=re.MULTILINE)
        assert parse_yaml(text, "profile").keys() == SlurmConfig.model_fields.keys() - {"profile"}
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.yaml").write_text(text, encoding="utf-8")
    slurm = load_config("smoke", ["slurm.profile=site"]).config.slurm
    assert (slurm.partition, slurm.account) == ("gpu", "my-project")
    assert (slurm.master_addr == "{host}-ib") == whole


def test_a_job_without_gpus_is_told_to_ask_for_them() -> None:
    """Not that none is visible here: on a login node none ever is."""
    for asked in ("parallel.plan=ddp", "parallel.plan=single"):
        config = load_config("smoke", [asked]).config
        with pytest.raises(ConfigError, match=r"slurm\.gpus_per_node is not set") as refused:
            resolve_for_job(config)
        assert "set slurm.gpus_per_node" in (refused.value.hint or "")
    assert resolve_for_job(load_config("smoke", ["parallel.plan=ddp", "slurm.extra.gres=gpu:2"]).config).gpus == 2
