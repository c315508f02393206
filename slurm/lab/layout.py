"""What one lab is: its folder, its ports, its names, and what it was asked for. Kept in lab.json inside the folder."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

# The folder stands beside the checkout's other ignored ones, wherever the command is called from.
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / ".slurm-lab"
FOLDER_VARIABLE = "SFT_DIST_SLURM_LAB_DIR"
# Every daemon carries this variable with its lab's tag as value: that is how `down` finds them.
MARK = "SFT_DIST_SLURM_LAB_TAG"
# Locked by whoever changes the lab; the first file in its folder, and the last.
LOCK = "lab.lock"
MAX_NODES = 16
# Below sft-dist's rendezvous ports (20000 to 32767) and below Linux' ephemeral ones.
FIRST_PORT, LAST_PORT = 10000, 19999
# Ports of one lab lie in one block of this size. More than MAX_NODES + 2 are needed.
PORT_BLOCK = 32


class LabError(Exception):
    """What the user can act on; shown without a traceback."""


@dataclass(frozen=True)
class Lab:
    """One lab. The fields are what lab.json holds; all paths and names follow from them."""

    folder: str
    tag: str
    host: str
    base_port: int
    # Whether nodes have a host name and a hosts file of their own (needs the right to make namespaces).
    separate: bool
    nodes: int = 2
    gpus: int = 2
    proctrack: str = "linuxproc"
    accounting: bool = True
    preempt_signal: bool = False
    requeue_delay: int = 10

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def slurm_conf(self) -> Path:
        return self.path / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.path / "munge" / "socket"

    @property
    def mariadb_socket(self) -> Path:
        return self.path / "mariadb" / "socket"

    @property
    def hosts_file(self) -> Path:
        """Mounted over /etc/hosts for the nodes' processes; the tag in its name marks them in /proc/PID/mountinfo."""
        return self.path / f"hosts.{self.tag}"

    @property
    def cluster(self) -> str:
        return f"lab{self.tag}"

    @property
    def node_names(self) -> list[str]:
        # SLURM names the cgroups of a node after the node alone, so two labs must not both have an n1 there.
        prefix = "n" if self.proctrack == "linuxproc" else f"n{self.tag[:4]}-"
        return [f"{prefix}{number}" for number in range(1, self.nodes + 1)]

    def node_address(self, index: int) -> str:
        """An address of its own in the loopback range for each node."""
        return f"127.0.0.{11 + index}"

    @property
    def controller_port(self) -> int:
        return self.base_port

    @property
    def accounting_port(self) -> int:
        return self.base_port + 1

    def node_port(self, index: int) -> int:
        return self.base_port + 2 + index

    @property
    def first_job(self) -> int:
        """Labs that run at the same time number their jobs apart: rendezvous ports are derived from job numbers."""
        return (self.base_port - FIRST_PORT) // PORT_BLOCK * 1000 + 1

    def log(self, daemon: str) -> Path:
        return self.path / "log" / f"{daemon}.log"

    @property
    def exports(self) -> str:
        return f"export SLURM_CONF={shlex.quote(str(self.slurm_conf))}\n"

    def save(self) -> None:
        (self.path / "lab.json").write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Lab | None:
    """The lab that was made in this folder; None if there is none. Raises LabError where lab.json is damaged."""
    try:
        values = json.loads((folder / "lab.json").read_text(encoding="utf-8"))
        return Lab(**{**values, "folder": str(folder)})
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise LabError(f"cannot read {folder}/lab.json: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise LabError(f"{folder}/lab.json is damaged ({error}); remove {folder} and start again") from None


def create(folder: Path, *, separate: bool, **options: object) -> Lab:
    """A new lab with a tag and free ports of its own; nothing is written yet."""
    # slurmctld compares the short name.
    host = socket.gethostname().split(".")[0]
    return Lab(str(folder), secrets.token_hex(4), host, free_ports(), separate, **options)  # type: ignore[arg-type]


def free_ports() -> int:
    """The first of PORT_BLOCK neighbouring ports that nobody listens on.

    The search starts at a place that depends on the process id, so that two labs started at once do not both find the
    same ports free before either has bound them.
    """
    blocks = (LAST_PORT + 1 - FIRST_PORT) // PORT_BLOCK
    for attempt in range(blocks):
        base = FIRST_PORT + (os.getpid() + attempt) % blocks * PORT_BLOCK
        if ports_are_free(base):
            return base
    raise LabError(f"no {PORT_BLOCK} neighbouring TCP ports between {FIRST_PORT} and {LAST_PORT} are free")


def ports_are_free(base: int) -> bool:
    for port in range(base, base + MAX_NODES + 2):
        with socket.socket() as probe:
            # As the daemons do: a port in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True
