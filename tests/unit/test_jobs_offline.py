"""The caches that a job gets to know, and what lies where its nodes do not look."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.jobs import offline
from sft_dist.jobs.offline import caches, out_of_sight, take_caches_of_job
from sft_dist.rundir import RunDir


def config(**slurm: Any) -> Config:
    return Config.model_validate({"run": {"name": "a"}, "model": {"name": "org/model"}, "slurm": slurm})


def test_the_job_gets_the_caches_of_this_shell_as_whole_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFT_DIST_CACHE", "here")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    monkeypatch.delenv("HF_HOME", raising=False)
    found = caches()
    assert found["SFT_DIST_CACHE"] == str(tmp_path / "here")
    assert found["HF_HUB_CACHE"] == str(Path.home() / "hub")
    assert found["HF_HOME"] == str(Path.home() / ".cache" / "huggingface")


def test_the_caches_of_the_profile_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setenv("HF_HOME", "/mine")
    take_caches_of_job(config(env={"HF_HOME": "/shared/hf", "OTHER": "x"}))
    assert caches()["HF_HOME"] == "/shared/hf"
    monkeypatch.setitem(sys.modules, "huggingface_hub", object())
    take_caches_of_job(config(env={"HF_HOME": "/shared/hf"}))
    with pytest.raises(ConfigError, match="one after the other"):
        take_caches_of_job(config(env={"HF_HOME": "/another"}))


def test_what_other_hosts_do_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/shared/venv")
    monkeypatch.setattr(
        offline, "_mounts", lambda: {Path("/"): "ext4", Path("/mem"): "tmpfs", Path("/mem/nfs"): "nfs4"}
    )
    monkeypatch.setenv("SFT_DIST_CACHE", "/mem/cache")
    monkeypatch.setenv("HF_HOME", "/mem/nfs/hf")
    found = out_of_sight(config(), RunDir(Path("/var/tmp/runs/a")))
    assert found == ["the run directory (/var/tmp/runs/a)", "SFT_DIST_CACHE (/mem/cache)"]
    monkeypatch.setenv("SFT_DIST_CACHE", "/shared/cache")
    assert out_of_sight(config(), RunDir(Path("/shared/runs/a"))) == []
