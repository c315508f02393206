"""The config that a run directory records is read back strictly, and to the same value."""

from __future__ import annotations

import pytest

from sft_dist.config.loader import load_config, load_run_config, write_config
from sft_dist.errors import ConfigError


def test_a_run_reads_back_the_config_that_was_written(tmp_path):
    overrides = [
        "train.extra={loss_type: dft, lr_scheduler_kwargs: {a: 1e-7}}",
        "data.system='no'",
        "evaluate.labels=['1e-5']",
    ]
    config = load_config("smoke", overrides).config
    file = tmp_path / "run" / "config.yaml"
    file.parent.mkdir()
    file.write_text(write_config(config))
    assert load_run_config(tmp_path / "run" / "config.yaml") == config
    assert load_run_config(tmp_path / "run") == config
    assert load_config(str(tmp_path / "run" / "config.yaml")).config == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: 1}\n", "train.lr   unknown key"),
        ("extends: base\n", "extends   unknown key"),
        ("data: {train: x.jsonl}\n", "data.train   'x.jsonl' is not a section"),
        ("run: {seed: '1'}\n", "run.seed   '1' is not a whole number"),
        ("", "holds no config"),
    ],
)
def test_a_run_directory_is_read_strictly(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path)
    assert words in str(caught.value)


def test_a_missing_run_config_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path / "nowhere")
