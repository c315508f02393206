"""What a run was made with: versions, git, host, devices. Never the environment's variables: they hold secrets."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sft_dist.files import utc_now
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.resolve import Resolved

PACKAGES = ("sft-dist", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "deepspeed", "peft")


def environment(machine: Machine, resolved: Resolved) -> dict[str, Any]:
    """The content of env.json."""
    return {
        "time": utc_now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": _git(),
        "cpu": machine.cpu,
        "cores": machine.cores,
        "cpu_bf16": machine.cpu_bf16,
        "memory_gib": round(machine.memory_gib, 1),
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "resolved": resolved.facts(),
        "decisions": list(resolved.decisions),
    }


def versions() -> dict[str, str]:
    """The installed version of each package that shapes a run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_facts(resolved: Resolved, data: str, template: str) -> dict[str, Any]:
    """What a manifest says of how its checkpoint was trained: `data` is the hash of the rows, `template` the text."""
    config = resolved.config
    unused = {"deepspeed": resolved.layout.plan.engine == "deepspeed", "peft": config.model.lora is not None}
    return {
        **resolved.facts(),
        "data": data,
        "template": _hash(template),
        "packing": resolved.config.data.packing,  # else each row is a sequence of its own, whatever the kernel joins
        "global_batch_size": config.train.global_batch_size,
        "config": _hash(json.dumps(config.model_dump(mode="json"), sort_keys=True)),
        "versions": {name: number for name, number in versions().items() if unused.get(name, True)},
    }


def _git() -> dict[str, str]:
    """Commit and state of the repository that the command was typed in, {} outside of one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    if commit.returncode != 0:
        return {}
    return {"commit": commit.stdout.strip(), "changed_files": str(len(status.stdout.splitlines()))}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
