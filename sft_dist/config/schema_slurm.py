"""The fields that say how a run becomes a SLURM job, SLURM's names where the meaning is SLURM's, and in which image it works."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sft_dist.config.section import Count, Section

SignalDelay = Annotated[int, Field(ge=1, le=65535)]


class SlurmConfig(Section):
    """The SLURM job of `sft-dist submit`; `train` reads none of it."""

    profile: str | None = None
    """Name of a cluster profile, a YAML file with fields of this section: ~/.config/sft-dist/profiles/NAME.yaml, or slurm/NAME.yaml or NAME.yaml in the current folder."""
    partition: str | None = None
    """Partition, or several with commas between them; the cluster's default if not set."""
    account: str | None = None
    """Account that the job is charged to."""
    qos: str | None = None
    """Quality of service."""
    time: str | Count | None = None
    """Time limit of one job: minutes, or SLURM's HH:MM:SS or D-HH:MM:SS; 60 minutes if not set. A run that is not done by then is requeued."""
    nodes: Count = 1
    """Nodes of the job."""
    gpus_per_node: Annotated[int, Field(ge=0)] | str | None = None
    """GPUs of each node: a number, or KIND:NUMBER as in `h100:8`; 0 trains on the CPU, and so does not set unless `extra` has `gres: gpu:NUMBER`."""
    gpu: str | None = None
    """Kind of the GPUs, for the planner: h100, h200, a100-80, ...; that of `gpus_per_node` if not set."""
    cpus_per_task: Count | None = None
    """CPUs of each task; with `tasks_per_node: one` those of a node."""
    mem: str | None = None
    """Memory of each node, as in 64G; 0 is all of it."""
    constraint: str | None = None
    """Node features that the job needs."""
    exclude: str | None = None
    """Nodes that the job must not get."""
    nodelist: str | None = None
    """Nodes that the job must get."""
    reservation: str | None = None
    """Reservation to take the nodes from."""
    extra: dict[str, Any] = {}
    """More options of sbatch by their long names, without the dashes; true for one that takes no value, false to leave out one of the profile's."""
    tasks_per_node: Literal["one", "gpu"] = "one"
    """`one` task on each node, which starts the node's processes with torchrun, or a task for each `gpu`'s process."""
    max_requeues: Annotated[int, Field(ge=0)] = 10
    """How often a job that was preempted or reached its time limit goes back into the queue; 0 never."""
    signal_delay_s: SignalDelay = 120
    """Seconds before the time limit at which the run is asked to stop and save."""
    modules: tuple[str, ...] = ()
    """Environment modules to load on the nodes."""
    setup: tuple[str, ...] = ()
    """Lines of shell that each job runs first; one that fails ends the job."""
    env: dict[str, str] = {}
    """Environment variables of the job. They are written into the job's script: no secrets."""
    master_addr: str | None = None
    """Where the processes meet, if the first node's name is not it; `{host}` stands for that name."""
    socket_ifname: str | None = None
    """Network interface between the nodes: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."""
    local_scratch: str | None = None
    """Folder on each node's own disk for the caches of compilers; may name variables such as $TMPDIR. The node's temporary folder if not set."""


class ContainerConfig(Section):
    """The image in which the run's processes work, here and in jobs; docs/containers.md says what was run for real."""

    runtime: Literal["none", "docker", "pyxis", "apptainer"] = "none"
    """What starts the image: `docker` or `apptainer` for `sft-dist train` here, `pyxis` (with enroot) or `apptainer` for jobs of SLURM. `none` works in the Python environment that sft-dist is typed in."""
    image: str | None = None
    """docker: name and tag of an image that is here; apptainer: path of a .sif file or a folder; pyxis: path of a .sqsh file, or an image of a registry as [USER@][REGISTRY#]IMAGE[:TAG]. It must hold this version of sft-dist."""
    mounts: tuple[str, ...] = ()
    """More folders to be seen inside, as PATH, PATH:PATH_INSIDE or PATH:PATH_INSIDE:ro. The current folder, the runs, the caches, and the files that the config names are seen under their own paths anyway; the home directory is not."""
    env: dict[str, str] = {}
    """Environment variables inside, before those that the image sets. They are written into files: no secrets."""
    workdir: str | None = None
    """Folder inside in which the run works; the current one, under its own path, if not set."""
