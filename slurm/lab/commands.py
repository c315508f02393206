"""The commands: up, down, status. What another program may read goes to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import daemons
import layout
import processes
from bring_up import bring_up, check_machine, find_or_make
from layout import Lab, LabError
from take_down import stop


def run(command: Callable[[], int]) -> int:
    try:
        return command()
    except LabError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; slurm/lab/down removes what was started")
        return 130


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def new_parser(command: Callable[[], int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"slurm/lab/{command.__name__}", description=command.__doc__)
    default = os.environ.get(layout.FOLDER_VARIABLE) or layout.DEFAULT_FOLDER
    hint = f"the lab's folder (default: {layout.FOLDER_VARIABLE} if set, else .slurm-lab in this checkout)"
    parser.add_argument("--dir", type=Path, default=Path(default), help=hint)
    return parser


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one command at a time change a lab. Makes the folder."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            with (folder / layout.LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A `down` that had it before us has removed the folder with the lock.
                if (folder / layout.LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino:
                    yield
                    return
        except FileNotFoundError:
            continue


def up() -> int:
    """Start a SLURM on this machine, or repair one, and print the exports that `eval` needs to point a shell at it."""
    parser = new_parser(up)
    add = parser.add_argument
    either = argparse.BooleanOptionalAction
    add("--nodes", type=int, metavar="N", help=f"nodes, 1 to {layout.MAX_NODES} (default: 2)")
    add("--gpus", type=int, metavar="N", help="fake GPUs a node, 0 to 8 (default: 2)")
    add("--proctrack", choices=("linuxproc", "cgroup"), help="how SLURM knows a job's processes (default: linuxproc)")
    add("--accounting", action=either, help="slurmdbd, for sacct (default: if it and MariaDB are installed)")
    add("--preempt-signal", action=either, help="a preempted job gets its --signal, not SIGTERM (default: no)")
    add("--requeue-delay", type=int, metavar="S", help="seconds a requeued job waits, 5 or more (default: 10)")
    options = vars(parser.parse_args())
    folder = options.pop("dir").absolute()
    asked = {name: value for name, value in options.items() if value is not None}
    os.umask(0o022)
    began = time.monotonic()
    check_machine(folder, asked)
    with locked(folder):
        lab = find_or_make(folder, asked)
        try:
            started = bring_up(lab)
        except BaseException:
            stop(lab, gently=False)
            say(f"all processes are stopped; the logs are in {folder}/log until slurm/lab/down removes them")
            raise
    if not started:
        say(f"the lab in {folder} is up already")
    else:
        say(f"{describe(lab)}; up after {time.monotonic() - began:.1f} s")
    sys.stdout.write(lab.exports)
    return 0


def describe(lab: Lab) -> str:
    names = "" if lab.separate else " (no right to make namespaces: the nodes' names mean nothing inside jobs)"
    accounting = "with" if lab.accounting else "without"
    return (
        f"{lab.folder}: {lab.nodes} nodes{names} with {lab.gpus} fake GPUs each, "
        f"{lab.proctrack}, {accounting} accounting"
    )


def down() -> int:
    """Stop the lab with everything that runs on it, and remove its folder. Does nothing where there is no lab."""
    parser = new_parser(down)
    parser.add_argument(
        "--keep", action="store_true", help="keep the folder with logs and accounting, for another `up`"
    )
    options = parser.parse_args()
    folder = options.dir.absolute()
    if not (folder / layout.LOCK).exists() and layout.load(folder) is None:
        say(f"there is no lab in {folder}")
        return 0
    if os.geteuid() != 0:
        raise LabError("only root can stop it: sudo slurm/lab/down")
    # Waits for an `up` that is under way, also if that has not got far enough to be seen from outside.
    with locked(folder):
        lab = layout.load(folder)
        if lab is not None:
            stop(lab, gently=options.keep)
        if lab is not None and not options.keep:
            shutil.rmtree(folder)
    say(f"the lab in {folder} is down; its folder is " + ("kept" if options.keep else "removed"))
    return 0


def status() -> int:
    """Show the lab's daemons, nodes and jobs. Ends with 1 where there is no lab, or a part of it is missing."""
    parser = new_parser(status)
    parser.add_argument("--env", action="store_true", help="print only the exports that point a shell at the lab")
    options = parser.parse_args()
    folder = options.dir.absolute()
    lab = layout.load(folder)
    if lab is None:
        say(f"there is no lab in {folder}; slurm/lab/up starts one")
        return 1
    if options.env:
        sys.stdout.write(lab.exports)
        return 0
    lines = [describe(lab), ""]
    missing = False
    for name in daemons.names(lab):
        pid = processes.remembered(lab, name)
        missing = missing or pid is None
        lines.append(f"{name:<20} {'not running' if pid is None else f'process {pid}'}")
    if not missing:
        for words in (("sinfo", "--format=%10P %10a %12l %6D %12T %N"), ("squeue",)):
            done = daemons.command(lab, *words)
            lines += ["", (done.stdout + done.stderr).rstrip()]
    else:
        lines += ["", "slurm/lab/up repairs it, slurm/lab/down removes it"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if missing else 0
