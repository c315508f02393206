"""From options to a cluster that takes jobs: makes a lab, starts what does not run, waits until nodes are usable."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cgroups
import conf
import daemons
import layout
import processes
from layout import Lab, LabError

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
}
# mariadb-install-db calls my_print_defaults.
FOR_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "my_print_defaults")
# A socket's path holds 107 characters, and SLURM's own lie deepest: FOLDER/spool/NODE/NODE_JOB.STEP.
MAX_FOLDER = 60
USABLE = {"idle", "mixed", "allocated", "completing"}


def check_machine(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raise LabError, with what to type, where this cannot become a lab."""
    for name, least, most in (("nodes", 1, layout.MAX_NODES), ("gpus", 0, 8), ("requeue_delay", 5, 3600)):
        if not least <= asked.get(name, least) <= most:
            raise LabError(f"--{name.replace('_', '-')} is {asked[name]}, not between {least} and {most}")
    if len(str(folder)) > MAX_FOLDER or not all(letter.isalnum() or letter in "/._-" for letter in str(folder)):
        raise LabError(
            f"{folder} cannot hold a lab: SLURM puts sockets below it, so it needs a path of at most {MAX_FOLDER} "
            "letters, digits and /._- ; name another one with --dir"
        )
    if not folder.parent.is_dir():
        raise LabError(f"{folder.parent} does not exist, so {folder} cannot be made")
    if folder.is_dir() and layout.load(folder) is None and {path.name for path in folder.iterdir()} - {layout.LOCK}:
        raise LabError(f"{folder} holds something else than a lab; name another folder with --dir")
    if os.geteuid() != 0:
        raise LabError("only root can start jobs for others: sudo slurm/lab/up")
    optional = FOR_ACCOUNTING if asked.get("accounting") is not True else ()
    missing = [program for program in PACKAGES if program not in optional and not installed(program)]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES.values()))
        raise LabError(
            f"{', '.join(missing)}: not installed. On Debian and Ubuntu:\n"
            f"  sudo apt-get install --no-install-recommends {packages}"
        )
    if asked.get("proctrack") == "cgroup" and (why := cgroups.unusable()):
        raise LabError(f"--proctrack cgroup cannot work here: {why}")


def installed(program: str) -> bool:
    return shutil.which(program, path=daemons.SEARCH_PATH) is not None


def find_or_make(folder: Path, asked: Mapping[str, Any]) -> Lab:
    """The folder's lab, if it is as asked for, or a new one."""
    lab = layout.load(folder)
    if lab is None:
        lab = layout.create(
            folder,
            separate=daemons.may_separate(),
            **{"accounting": all(map(installed, FOR_ACCOUNTING)), **asked},
        )
        lab.save()
        return lab
    differing = [name for name, value in asked.items() if getattr(lab, name) != value]
    if differing:
        has = ", ".join(f"{name.replace('_', '-')} {getattr(lab, name)}" for name in differing)
        raise LabError(f"the lab in {folder} was made with {has}; take it down first")
    return lab


def bring_up(lab: Lab) -> bool:
    """Start what does not run, and wait until the cluster takes jobs. Returns whether anything was to do."""
    everything = daemons.names(lab)
    absent = [name for name in everything if processes.remembered(lab, name) is None]
    if not absent and nodes_are_usable(lab):
        return False
    if absent == everything:
        # A job's process may have outlived all daemons. Others may have taken the ports, and nothing knows them yet.
        processes.end_all(lab, patience=10)
        if not layout.ports_are_free(lab.base_port):
            lab = dataclasses.replace(lab, base_port=layout.free_ports())
            lab.save()
        conf.write(lab)
    for name in absent:
        daemons.start_one(lab, name)
        if name == "slurmdbd":
            add_associations(lab)
    wait_for_nodes(lab)
    return True


def add_associations(lab: Lab) -> None:
    """An account with root and whoever called sudo, so that sacct shows what it shows on a real cluster."""
    cluster = f"cluster={lab.cluster}"
    users = ",".join(dict.fromkeys(("root", os.environ.get("SUDO_USER", "root"))))
    for request in (
        ["add", "cluster", lab.cluster],
        ["add", "account", "lab", cluster],
        ["add", "user", users, "account=lab", cluster],
    ):
        done = daemons.command(lab, "sacctmgr", "--immediate", *request)
        answer = (done.stdout + done.stderr).strip()
        # It answers 1 to what is there already, as in a lab that was kept.
        if done.returncode and not any(known in answer for known in ("already exists", "Nothing new added")):
            raise LabError(f"sacctmgr {' '.join(request)}: {answer}{daemons.log_end(lab, 'slurmdbd')}")


def node_states(lab: Lab) -> dict[str, str]:
    """SLURM's word for the state of each node; a star and the like behind it are cut off."""
    listed = daemons.command(lab, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
    pairs = (line.split() for line in listed.stdout.splitlines())
    # A star says that the node does not answer, which counts as a state of its own here.
    return {name: state.rstrip("~#!%$@^-") for name, state in pairs}


def nodes_are_usable(lab: Lab) -> bool:
    states = node_states(lab)
    return len(states) == lab.nodes and USABLE.issuperset(states.values())


def wait_for_nodes(lab: Lab) -> None:
    began = time.monotonic()
    resumed = False
    while not nodes_are_usable(lab):
        waited = time.monotonic() - began
        dead = [name for name in daemons.names(lab) if processes.remembered(lab, name) is None]
        if dead or waited > daemons.PATIENCE:
            what = f"ended: {', '.join(dead)}" if dead else f"after {waited:.0f} s: {node_states(lab)}"
            culprit = dead[0] if dead else f"slurmd.{lab.node_names[0]}"
            raise LabError(f"the nodes do not come up, {what}{daemons.log_end(lab, culprit)}")
        if waited > 5 and not resumed:
            # Whoever repairs a lab wants its nodes back, also those that somebody drained or set down.
            daemons.command(lab, "scontrol", "update", f"NodeName={','.join(lab.node_names)}", "State=RESUME")
            resumed = True
        time.sleep(0.1)
