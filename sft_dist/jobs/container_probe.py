"""Before a run is put into an image: the runtime is there, so is the image, and the package inside is this one."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sft_dist import __version__
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.jobs.container import (
    INSIDE,
    PYTHON,
    apptainer_exec,
    docker_run,
    image,
    is_file_name,
    make_folders,
    outside_environment,
)
from sft_dist.parallel.machine import this_machine

log = logging.getLogger(__name__)
# Unpacking an image on a slow disk takes a while.
TIMEOUT_S = 300.0
# -I: the package of the image, not one in a folder that this shell names.
ASK_VERSION = (PYTHON, "-I", "-c", "import sft_dist; print(sft_dist.__version__)")
HOW = "docs/containers.md says how to build it"


def enter_image(
    config: Config, arguments: Sequence[str], runs: Path, files: Iterable[Path] = (), *, talks: bool = False
) -> None:
    """Go on with `sft-dist ARGUMENTS` inside of the config's image: this process becomes the runtime's, and does not return.

    Returns if there is no image, or if this is inside of one. Raises ConfigError or PreflightError if it cannot be.
    """
    runtime = config.container.runtime
    if runtime == "none" or os.environ.get(INSIDE):
        return
    prove_container(config, job=False)
    make_folders(runs)
    gpus = len(this_machine().gpus)
    if runtime == "docker":
        words = docker_run(config, runs, gpus, files, talks=talks)
    else:
        words = apptainer_exec(config, runs, gpus, files)
    log.info("in the image %s (%s)", config.container.image, runtime)
    sys.stdout.flush()
    sys.stderr.flush()
    _forget_signals()
    os.execvpe(words[0], [*words, "-m", "sft_dist", *arguments], outside_environment(config, os.environ))


def _forget_signals() -> None:
    """What this process blocks until it has handlers, and what Python ignores, would stay so in the program after it."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def prove_container(config: Config, *, job: bool) -> None:
    """Ask the runtime for the image and its version of sft-dist; `job` for one of SLURM, else for this machine.

    What this host cannot know is left to the job's nodes, and said. Raises ConfigError for a runtime that does not go with
    it, PreflightError for what is missing.
    """
    runtime = config.container.runtime
    if runtime == "none" or (job and os.environ.get(INSIDE)):
        return
    if job and runtime == "docker":
        raise ConfigError(
            "container.runtime is docker, which has no part in SLURM", hint="container.runtime=apptainer or pyxis"
        )
    if not job and runtime == "pyxis":
        raise ConfigError(
            "container.runtime is pyxis, which starts only jobs of SLURM",
            hint="sft-dist submit; or here: container.runtime=docker, apptainer or none",
        )
    {"docker": _prove_docker, "apptainer": _prove_apptainer, "pyxis": _prove_pyxis}[runtime](config, job)
    make_folders()


def _prove_docker(config: Config, job: bool) -> None:
    name = image(config)
    _refuse_missing("docker", config, job=job)
    status, said = _ask(["docker", "image", "inspect", "--format", "{{.Id}}", name])
    if status and ("no such image" in said.lower() or "no such object" in said.lower()):
        raise PreflightError(f"container.image {name!r} is not here", hint=f"docker pull {name}; {HOW}")
    if status:
        raise PreflightError(
            f"container.runtime is docker, whose engine does not answer: {_last_line(said)}",
            hint="start the engine (docker info asks it), join its group, or set container.runtime=none",
        )
    _refuse_other_version(config, ["docker", "run", "--rm", "--network=none", name, *ASK_VERSION])


def _prove_apptainer(config: Config, job: bool) -> None:
    _refuse_missing_file(config)
    if _refuse_missing("apptainer", config, job=job):
        _refuse_other_version(config, ["apptainer", "exec", "--no-home", image(config), *ASK_VERSION])


def _prove_pyxis(config: Config, job: bool) -> None:
    if is_file_name(str(config.container.image)):
        _refuse_missing_file(config)
    else:
        log.warning(
            "each node will fetch and unpack %s by itself; enroot import makes a file of it once", image(config)
        )
    _refuse_missing("srun", config, job=job)
    status, said = _ask(["srun", "--help"])
    if status or "--container-image" not in said:
        raise PreflightError(
            "container.runtime is pyxis, but srun here has no --container-image",
            hint="ask the cluster's administrators for pyxis, or set container.runtime=apptainer",
        )


def _refuse_missing(program: str, config: Config, *, job: bool) -> bool:
    """Whether the program is here; it need not be where the job's nodes may have it by a module."""
    if shutil.which(program):
        return True
    if job and program == "apptainer" and (config.slurm.modules or config.slurm.setup):
        log.warning(
            "there is no apptainer on this host, so the image was not opened; the job will say if it does not fit"
        )
        return False
    raise PreflightError(
        f"container.runtime is {config.container.runtime}, but there is no {program} on this host",
        hint="install it, or set container.runtime=none"
        + ("; if nodes have it by a module: slurm.modules=[apptainer]" if job and program == "apptainer" else ""),
    )


def _refuse_missing_file(config: Config) -> None:
    path = Path(image(config))
    if not path.exists():
        raise PreflightError(f"container.image: there is no {path}", hint=HOW)


def _refuse_other_version(config: Config, command: Sequence[str]) -> None:
    status, said = _ask(command)
    found = said.splitlines()[-1].strip() if said.strip() else ""
    if status:
        raise PreflightError(
            f"container.image {config.container.image!r} does not run sft-dist with its {PYTHON}: {_last_line(said)}",
            hint=HOW,
        )
    if found != __version__:
        raise PreflightError(
            f"container.image {config.container.image!r} holds sft-dist {found}, and this is {__version__}",
            hint="build the image from this version, or install that one here",
        )


def _ask(command: Sequence[str]) -> tuple[int, str]:
    """Exit status of a command, and what it said; on stderr only if it failed."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()[:300]
