"""The body of `sft-dist sync`: what wandb wrote without a network goes to its server, by wandb's own `wandb sync`.

wandb's exit status says nothing: 0 although the server refused everything. What counts is the file that it leaves beside
each recording that it has uploaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft_dist.errors import PreflightError, SftDistError
from sft_dist.rundir import RunDir

# The worker makes its recordings in logs/; scripts of someone's own may have let wandb write where it wants.
PLACES = ("logs/wandb", "wandb", "*/*/wandb")
TIMEOUT_S = 10.0
# Runs whose recordings are uploaded side by side; each waits for the network most of the time.
AT_ONCE = 4
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
# What wandb-core writes before the first record; all that is left of an attempt which was killed in its first seconds.
HEADER_BYTES = 7
# The end of a recording whose writer was killed.
TORN = re.compile("incomplete record|transactionlog: error getting next record")
# A key that is wrong, or none: what wandb and its server say.
REFUSED = re.compile(r"No API key|not authenticated|error 40[13]|invalid.*api key", re.IGNORECASE)


@dataclass(frozen=True)
class Recording:
    """What one attempt of a run left: a folder offline-run-DATE-ID with a file run-ID.wandb."""

    file: Path

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def mark(self) -> Path:
        """What wandb leaves beside a recording that it has uploaded to the end."""
        return self.file.with_name(self.file.name + ".synced")

    @property
    def uploaded(self) -> bool:
        return self.mark.exists()

    @property
    def empty(self) -> bool:
        return self.file.stat().st_size <= HEADER_BYTES


@dataclass(frozen=True)
class Synced:
    """What became of a run's recordings."""

    run: RunDir
    uploaded: tuple[Path, ...]
    """Folders uploaded now."""
    before: int
    """How many were uploaded at an earlier time."""
    in_use: tuple[Path, ...] = ()
    """Still written to; left for the next time."""
    refused: tuple[Path, ...] = ()
    """Not uploaded, although wandb was asked to."""
    url: str | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        paths = {name: [str(path) for path in getattr(self, name)] for name in ("uploaded", "in_use", "refused")}
        return {"run": self.run.name, "path": str(self.run.path), **paths, "before": self.before, "url": self.url}


def recordings(run: RunDir) -> list[Recording]:
    """The recordings below the run's folder that hold anything, oldest first."""
    found = {file for place in PLACES for file in run.path.glob(f"{place}/offline-run-*/run-*.wandb")}
    every = [Recording(file) for file in sorted(found, key=lambda file: file.parent.name)]
    return [recording for recording in every if not recording.empty]


def sync(runs: Sequence[RunDir], *, at_work: Collection[Path]) -> tuple[list[Synced], str | None]:
    """Upload what is not uploaded yet; what became of each run that has recordings, and what wandb said if some stayed.

    Of the runs whose paths are `at_work` the newest recording stays for later: wandb would mark it as done. Raises
    PreflightError without wandb, a network or an account.
    """
    plan = {run: recordings(run) for run in runs}
    in_use = {run: plan[run][-1:] if run.path in at_work else [] for run in runs}
    due = {run: [it for it in plan[run] if not it.uploaded and it not in in_use[run]] for run in runs}
    before = {run: sum(it.uploaded for it in plan[run]) for run in runs}
    if any(due.values()):
        if importlib.util.find_spec("wandb") is None:
            raise PreflightError("the package wandb is not installed", hint="pip install 'sft-dist[wandb]'")
        _needs_network(server())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = "".join(pool.map(_upload, due.values()))
    results = [
        Synced(
            run,
            uploaded=tuple(it.folder for it in due[run] if it.uploaded),
            before=before[run],
            in_use=tuple(it.folder for it in in_use[run] if not it.uploaded),
            refused=tuple(it.folder for it in due[run] if not it.uploaded),
            url=_url(said, plan[run]),
        )
        for run in runs
        if plan[run]
    ]
    return results, _complaint(said) if any(it.refused for it in results) else None


def _upload(due: Sequence[Recording]) -> str:
    """Upload a run's recordings, oldest first, as far as it goes; returns all that wandb said.

    A call for each: a recording whose writer was killed ends in the middle of a record. wandb uploads what is whole and
    then fails, without always saying where, and leaves the others of the same call alone. It is marked here, since a second
    time would add the same again.
    """
    said = ""
    for recording in due:
        told = _wandb_sync(recording.folder.absolute())
        said += told
        unreadable = "Failed to read" in told
        if TORN.search(told) and not unreadable:
            recording.mark.touch()
        if not recording.uploaded and not unreadable:
            break  # what comes later must not stand before it
    return said


def _wandb_sync(folder: Path) -> str:
    """What `wandb sync` says of this folder."""
    # Offline mode is the nodes'; a key is asked for nowhere: nobody may be there to type it.
    env = {**os.environ, "WANDB_MODE": "online", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if REFUSED.search(done.stdout):
        hint = "type `wandb login` once, or export WANDB_API_KEY (WANDB_BASE_URL for a server of your own)"
        raise PreflightError(f"wandb takes no upload from here: {_complaint(done.stdout)}", hint=hint)
    if done.returncode != 0 and not re.search(r"Syncing \d+ run", done.stdout):
        raise SftDistError(f"`wandb sync` ended with exit status {done.returncode}: {_complaint(done.stdout)}")
    return done.stdout


def server() -> str:
    """The address of wandb's server, as wandb itself finds it: from the environment, or its settings file."""
    try:
        from wandb.sdk import wandb_setup

        return str(wandb_setup.singleton().settings.base_url)
    except Exception:  # internals of another version
        return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _needs_network(address: str, env: Mapping[str, str] = os.environ) -> None:
    """PreflightError if the server cannot be reached: wandb would try for days."""
    if any(env.get(name) for name in PROXIES):
        return
    parts = urlsplit(address)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"wandb's server {address} cannot be reached from here: {error}",
            hint="type sync on a host with a network, such as the login node; WANDB_BASE_URL names another server",
        ) from None


def _complaint(said: str) -> str:
    """The error among wandb's lines, the last line if none is marked as one."""
    lines = [re.sub(r"^wandb:\s*", "", line).strip() for line in said.splitlines()]
    told = [line for line in lines if line]
    errors = [re.sub(r"^(ERROR|Error:)\s*", "", line) for line in told if re.match(r"ERROR|Error:", line)]
    errors = [line for line in errors if not line.startswith("Find detailed error logs")]
    return (errors or told or ["it said nothing"])[-1][:300]


def _url(said: str, of_run: Sequence[Recording]) -> str | None:
    ids = {it.file.stem.removeprefix("run-") for it in of_run}
    found = re.findall(r"([^/\[\]]+)\] View run (?:.* )?at (\S+)", said)
    return next((url for name, url in found if name in ids), None)
