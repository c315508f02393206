"""Starts a lab's daemons, one after the other, each as soon as the one it needs answers."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import processes
from layout import MARK, Lab, LabError

# sudo and cron leave the sbin folders out.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How long any one daemon may take to answer on a busy machine; a second is usual.
PATIENCE = 60.0
# In a mount and a UTS namespace of its own: the node's hosts file over /etc/hosts, and the node's name.
AS_A_NODE = 'mount --bind "$1" /etc/hosts && echo "$2" >/proc/sys/kernel/hostname && shift 2 && exec "$@"'
# A MariaDB that never leaves this machine and holds nothing worth a disk flush.
SMALL_DATABASE = (
    "--no-defaults",
    "--user=root",
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=8M",
    "--innodb-flush-method=nosync",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
)


def environment(lab: Lab) -> dict[str, str]:
    """What daemons and SLURM's commands are started with: nothing of the caller's, who may be inside another job."""
    return {
        "PATH": SEARCH_PATH,
        "LANG": "C",
        "HOME": "/",
        "SLURM_CONF": str(lab.slurm_conf),
        "MYSQL_UNIX_PORT": str(lab.mariadb_socket),
    }


def command(lab: Lab, *words: str, patience: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands against the lab. The caller looks at returncode."""
    try:
        return subprocess.run(
            words, env=environment(lab), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]}: no answer within {patience:.0f} s")


def start(lab: Lab, name: str, words: list[str]) -> None:
    """Start a daemon in the foreground mode that each has, so that its process number is known."""
    with lab.log(name).open("ab") as log:
        process = subprocess.Popen(
            words,
            # Not for SLURM's commands: a job inherits their environment, and jobs have marks of their own.
            env={**environment(lab), MARK: lab.tag},
            cwd=lab.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    processes.remember(lab, name, process.pid)


def wait(lab: Lab, name: str, answers: Callable[[], bool], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not answers():
        if processes.remembered(lab, name) is None:
            raise LabError(f"{name} ended while it started{log_end(lab, name)}")
        if time.monotonic() > deadline:
            raise LabError(f"{name} does not answer after {patience:.0f} s{log_end(lab, name)}")
        time.sleep(0.05)


def log_end(lab: Lab, name: str) -> str:
    try:
        lines = lab.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join([f"; the end of {lab.log(name)}:", *(f"  {line}" for line in lines[-8:])])


def listens(address: str | Path) -> bool:
    """Whether somebody accepts connections on a Unix socket (a path) or on a TCP port ("127.0.0.1:port")."""
    local = isinstance(address, Path)
    with socket.socket(socket.AF_UNIX if local else socket.AF_INET) as probe:
        probe.settimeout(1)
        try:
            if local:
                probe.connect(str(address))
            else:
                host, _, port = str(address).rpartition(":")
                probe.connect((host, int(port)))
        except OSError:
            return False
    return True


# --- the daemons ---------------------------------------------------------------------------------------------------


def start_munged(lab: Lab) -> None:
    key = lab.path / "munge" / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
    words = ["munged", "--foreground", "--num-threads=2", "--origin=127.0.0.1"]
    # --force: it otherwise refuses folders below a home directory that is not root's.
    words += ["--force", f"--key-file={key}", f"--socket={lab.munge_socket}"]
    words += [f"--{name}-file={lab.path}/munge/{name}" for name in ("pid", "seed", "log")]
    start(lab, "munged", words)
    wait(lab, "munged", lambda: listens(lab.munge_socket))


def start_mariadbd(lab: Lab) -> None:
    data, temporary = lab.path / "mariadb" / "data", lab.path / "mariadb" / "tmp"
    # Not in /tmp: two that start at the same moment give their temporary tables the same names.
    temporary.mkdir(parents=True, exist_ok=True)
    own = [f"--datadir={data}", f"--tmpdir={temporary}"]
    if not (data / "mysql").is_dir():
        install = ["mariadb-install-db", *SMALL_DATABASE, *own, "--skip-test-db", "--skip-name-resolve"]
        done = command(lab, *install, "--auth-root-authentication-method=normal", patience=PATIENCE)
        if done.returncode:
            raise LabError(f"mariadb-install-db failed:\n{(done.stdout + done.stderr)[-2000:]}")
    words = ["mariadbd", *SMALL_DATABASE, *own, f"--socket={lab.mariadb_socket}"]
    # Only root can reach the socket's folder, so there is nobody to tell apart by passwords.
    words += ["--skip-networking", "--skip-grant-tables", "--performance-schema=off", "--skip-log-bin"]
    # slurmdbd complains about less.
    words += ["--innodb-lock-wait-timeout=900", f"--pid-file={lab.path}/run/mariadbd.pid"]
    start(lab, "mariadbd", words)
    wait(lab, "mariadbd", lambda: listens(lab.mariadb_socket))


def start_slurmdbd(lab: Lab) -> None:
    start(lab, "slurmdbd", ["slurmdbd", "-D"])
    wait(lab, "slurmdbd", lambda: listens(f"127.0.0.1:{lab.accounting_port}"))


def start_slurmctld(lab: Lab) -> None:
    start(lab, "slurmctld", ["slurmctld", "-D", "-f", str(lab.slurm_conf)])
    wait(lab, "slurmctld", lambda: listens(f"127.0.0.1:{lab.controller_port}"))


def start_slurmd(lab: Lab, node: str) -> None:
    words = ["slurmd", "-D", "-f", str(lab.slurm_conf), "-N", node]
    if lab.separate:
        words = ["unshare", "--mount", "--uts", "sh", "-c", AS_A_NODE, "sh", str(lab.hosts_file), node, *words]
    start(lab, f"slurmd.{node}", words)


def names(lab: Lab) -> list[str]:
    """The daemons of this lab, in the order in which they start."""
    accounting = ["mariadbd", "slurmdbd"] if lab.accounting else []
    return ["munged", *accounting, "slurmctld", *(f"slurmd.{node}" for node in lab.node_names)]


def start_one(lab: Lab, name: str) -> None:
    starters: Mapping[str, Callable[[Lab], None]] = {
        "munged": start_munged,
        "mariadbd": start_mariadbd,
        "slurmdbd": start_slurmdbd,
        "slurmctld": start_slurmctld,
    }
    kind, _, node = name.partition(".")
    if kind == "slurmd":
        start_slurmd(lab, node)
    else:
        starters[kind](lab)


def may_separate() -> bool:
    """Whether nodes can have namespaces: root has the right to on a machine, and not in most containers."""
    probe = ["unshare", "--mount", "--uts", "sh", "-c", AS_A_NODE, "sh", "/etc/hosts", "probe", "true"]
    found = subprocess.run(probe, capture_output=True, env={**os.environ, "PATH": SEARCH_PATH})
    return found.returncode == 0
