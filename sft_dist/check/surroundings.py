"""What stands around this machine: the Hub, a SLURM, runtimes of containers. Nothing of it is needed to train here."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence

from sft_dist.check.finding import Finding

TIMEOUT_S = 10.0
HUB = "https://huggingface.co"
# How each runtime says its version; docker's is that of the daemon, without which its command is of no use.
RUNTIMES = {
    "docker": ("docker", "version", "--format", "{{.Server.Version}}"),
    "apptainer": ("apptainer", "--version"),
    "enroot": ("enroot", "version"),
}


def look_at_network() -> Finding:
    """Whether the Hub answers, unless the environment forbids to ask it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("network", "ok", "HF_HUB_OFFLINE is set: models and data come from files and the cache")
    address = os.environ.get("HF_ENDPOINT") or HUB
    fix = "fetch on a machine with network (sft-dist submit does, before it queues), or name files; then set HF_HUB_OFFLINE=1"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:  # it has answered
        if error.code >= 500:
            return Finding("network", "note", f"{address} answers with status {error.code}", fix)
    except (OSError, ValueError) as error:
        why = str(getattr(error, "reason", error))
        if proxy := _proxy(address):
            fix = f"correct or unset {proxy.partition(' ')[0]}; or {fix}"
            return Finding("network", "note", f"{address} does not answer by way of {proxy}: {why}", fix)
        return Finding("network", "note", f"{address} does not answer: {why}", fix)
    return Finding("network", "ok", f"{address} answers")


def _proxy(address: str) -> str:
    """The variable that names a proxy on the way to `address`, and the proxy, without name and password; "" for none."""
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return f"{parts.scheme}_proxy ({proxy.rpartition('@')[2]})"


def look_at_slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "ok", "none here: sft-dist submit needs a login node, or slurm/lab")
    status, version = ask(("sbatch", "--version"))
    if status:
        return Finding(
            "SLURM", "note", f"sbatch fails: {last_line(version)}", "SLURM_CONF must name the cluster's slurm.conf"
        )
    status, partitions = ask(("sinfo", "--noheader", "--format=%P"))
    if status:
        fix = "SLURM_CONF must name the cluster's slurm.conf, and munged must run here"
        return Finding("SLURM", "note", f"{version}, and its controller does not answer: {last_line(partitions)}", fix)
    if shutil.which("srun") is None:
        return Finding("SLURM", "note", f"{version}, without srun", "install SLURM's client programs")
    names = sorted({name.strip() for name in partitions.split()})
    return Finding("SLURM", "ok", f"{version}, partitions: {', '.join(names)}")


def look_at_runtimes() -> Iterator[Finding]:
    """The runtimes of `container.runtime`; pyxis shows as an option of srun."""
    found = False
    for name, words in RUNTIMES.items():
        if shutil.which(words[0]) is None:
            continue
        found = True
        status, said = ask(words)
        if status:
            yield Finding("containers", "note", f"{name} is here and fails: {last_line(said)}", "docs/containers.md")
        else:
            yield Finding("containers", "ok", f"{name} {last_line(said).removeprefix(name).strip()}")
    if shutil.which("srun") is not None:
        status, said = ask(("srun", "--help"))
        if not status and "--container-image" in said:
            found = True
            yield Finding("containers", "ok", "pyxis")
    if not found:
        yield Finding("containers", "ok", "no runtime here")


def ask(words: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a command; 127 with the reason if it cannot be started or does not end."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return 127, str(error)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()


def last_line(text: str) -> str:
    return text.splitlines()[-1].strip() if text.strip() else "it does not say why"
