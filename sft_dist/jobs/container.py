"""The command lines that put a run into an image, here and in jobs of SLURM. Folders are seen inside under their own paths.

The options are those that `docker run`, pyxis (`srun --container-...`) and `apptainer exec` document. What requeues a job
stays outside of the image, in the batch script. docs/containers.md says what was run for real.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist import __version__
from sft_dist.config.rules_slurm import gpus_of, mount_parts
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.jobs.offline import caches, named_files

# Set inside to the version that started the image; docker/Dockerfile sets it, too. With it nothing is put into an image again.
INSIDE = "SFT_DIST_INSIDE"
PYTHON = "python3"
# Compilers' caches, which an image may have set to a folder of its own.
COMPILED = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
# What docker hands on from this shell, by name, so that no value stands in a command line.
HANDED_ON = re.compile(
    r"(HF|WANDB|SFT_DIST|NCCL|GLOO|TRANSFORMERS|TOKENIZERS|OMP|MKL|CUDA|TORCH|PYTORCH)_\w+|USER|LOGNAME|NO_COLOR|LANG|TZ"
    r"|(HTTP|HTTPS|ALL|NO)_PROXY|(http|https|all|no)_proxy",
    re.ASCII,
)
# What separates the parts of a mount for each of them; pyxis writes a file with blanks between them, and expands variables.
UNFIT = {"docker": r'[,"\r\n]', "apptainer": r"[,:\\\r\n]", "pyxis": r"[,:\\$\s]"}


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host, and where it is seen inside."""

    source: str
    target: str
    mode: str = "rw"

    @property
    def colons(self) -> str:
        return f"{self.source}:{self.target}" + (":ro" if self.mode == "ro" else "")

    @property
    def for_docker(self) -> str:
        return f"type=bind,source={self.source},target={self.target}" + (",readonly" if self.mode == "ro" else "")


@dataclass(frozen=True)
class JobContainer:
    """What a container adds to the batch script; of none, nothing but the Python that srun starts."""

    python: str = ""
    """The command before `-m submitit...`, as shell text."""
    srun_args: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """Lines of shell before those of `slurm`, and after them."""
    after: tuple[str, ...] = ()


def job_container(config: Config, runs: Path) -> JobContainer:
    """How a job of SLURM works in the config's image; `runs` is the folder of its run directory.

    Raises ConfigError for docker, which has no part in SLURM, and for paths that the runtime cannot mount.
    """
    container = config.container
    if container.runtime == "none":
        return JobContainer(shlex.quote(sys.executable))
    if container.runtime == "docker":
        raise ConfigError(
            "container.runtime is docker, which has no part in SLURM",
            hint="container.runtime=apptainer or pyxis for a job; none where the nodes have sft-dist installed",
        )
    # Python's own settings of the host would reach into the image.
    before = ("unset PYTHONPATH PYTHONHOME",)
    forced = {**config.slurm.env, **variables(config)}
    after = [f"export {name}={shlex.quote(value)}" for name, value in forced.items()]
    if container.runtime == "apptainer":
        after += [f'export APPTAINERENV_{name}="${name}"' for name in forced]
        return JobContainer(
            shlex.join(apptainer_exec(config, runs, gpus_of(config.slurm)[1])), (), before, tuple(after)
        )
    seen = ",".join(mount.colons for mount in mounts(config, runs))
    options = [f"--container-image={image(config)}", f"--container-mounts={seen}"]
    options += [f"--container-workdir={workdir(config)}", "--no-container-mount-home", "--no-container-remap-root"]
    # Else what the image sets would win over the job.
    options.append(f"--container-env={','.join(forced)}")
    return JobContainer(PYTHON, tuple(options), before, tuple(after))


def spec_inside(config: Config) -> dict[str, Any]:
    """What a task must know beyond other jobs: the version that its image must hold, and variables that only the image sets."""
    if config.container.runtime == "none":
        return {}
    chosen = {*config.slurm.env, *config.container.env}
    return {"package": __version__, "image_sets": [name for name in COMPILED if name not in chosen]}


def apptainer_exec(config: Config, runs: Path, gpus: int, files: Iterable[Path] = ()) -> list[str]:
    """`apptainer exec` up to the inner Python, which takes the place of it in the process tree and hears its signals."""
    # --no-eval: values of variables are not read as shell. --pwd is also known to singularity.
    words = ["apptainer", "exec", "--no-home", "--no-eval", *(["--nv"] if gpus else [])]
    for mount in mounts(config, runs, files):
        words += ["--bind", mount.colons]
    return [*words, "--pwd", workdir(config), image(config), PYTHON]


def docker_run(config: Config, runs: Path, gpus: int, files: Iterable[Path] = (), *, talks: bool = False) -> list[str]:
    """`docker run` up to the inner Python; with `talks` at this terminal."""
    # --init: as process 1 Python would not end by signals that it does not handle, and docker hands on all of them.
    words = ["docker", "run", "--rm", "--init", "--sig-proxy=true", "--user", f"{os.getuid()}:{os.getgid()}"]
    words.append("--ipc=host")
    if gpus:
        # NCCL pins memory. Without GPUs nothing does, and an engine that may not lift limits would not start.
        words += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", "--gpus=all"]
    words += ["--interactive", *(["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else [])] if talks else []
    for mount in mounts(config, runs, files):
        words += ["--mount", mount.for_docker]
    inside = variables(config)
    for name in sorted(os.environ):
        if HANDED_ON.fullmatch(name) and name not in inside:
            words += ["--env", name]
    for name, value in inside.items():
        words += ["--env", f"{name}={value}"]
    return [*words, "--workdir", workdir(config), image(config), PYTHON]


def variables(config: Config) -> dict[str, str]:
    """What is set inside whatever the image says: the caches of this host, and the config's own."""
    local = f"/tmp/sft-dist-{os.getuid()}"
    compiled = {name: f"{local}/{folder}" for name, folder in COMPILED.items()}
    # Packages of the user for the host's Python do not fit the image's.
    return {"PYTHONNOUSERSITE": "1", **compiled, **caches(), **config.container.env, INSIDE: __version__}


def image(config: Config) -> str:
    """The image as the runtime takes it: a file by its whole path, since a job may start in another folder."""
    name = str(config.container.image)
    if config.container.runtime == "docker" or (config.container.runtime == "pyxis" and not is_file_name(name)):
        return name
    return str(Path(name).expanduser().absolute())


def is_file_name(name: str) -> bool:
    """Whether `container.image` names a file and not an image of a registry; pyxis takes what starts with . or / for one."""
    return name.startswith((".", "/", "~")) or name.endswith((".sqsh", ".sif"))


def workdir(config: Config) -> str:
    return config.container.workdir or str(Path.cwd())


def mounts(config: Config, runs: Path, files: Iterable[Path] = ()) -> list[Mount]:
    """What must be seen inside: each folder once, none that lies in another. Raises ConfigError for names that do not fit."""
    found: dict[str, Mount] = {}
    for folder in _folders(config, runs, files):
        for path in dict.fromkeys((folder.resolve(), folder)):  # links lead to where they lead outside
            if not any(Path(seen) in (path, *path.parents) for seen in found):
                found = {seen: mount for seen, mount in found.items() if path not in Path(seen).parents}
                found[str(path)] = Mount(str(path), str(path))
    for text in config.container.mounts:
        source, target, mode = mount_parts(text)
        found[target] = Mount(source, target, mode)
    for mount in found.values():
        for name in (mount.source, mount.target):
            if re.search(UNFIT[config.container.runtime], name):
                raise ConfigError(
                    f"{config.container.runtime} cannot mount {name!r}: its name holds a sign that ends a path there",
                    hint="move it, or name another place: run.dir, SFT_DIST_CACHE, HF_HOME",
                )
    return list(found.values())


def _folders(config: Config, runs: Path, files: Iterable[Path]) -> Iterator[Path]:
    """Those that the run works in, and those of what the config and the command line name."""
    own = [Path.cwd(), runs.absolute(), *(Path(path) for path in caches().values())]
    for path in [*own, *(path for _, path in named_files(config)), *(path.absolute() for path in files)]:
        there = path
        while path not in own and not there.is_dir():
            there = there.parent
        if there != Path("/"):
            yield there


def make_folders(*more: Path) -> None:
    """Make what is to be mounted and is not there yet: a runtime refuses it, or makes it as another user."""
    for folder in (*more, *(Path(path) for path in caches().values())):
        folder.mkdir(parents=True, exist_ok=True)


def outside_environment(config: Config, env: Mapping[str, str]) -> dict[str, str]:
    """The environment in which the runtime itself is started."""
    if config.container.runtime != "apptainer":
        return dict(env)
    kept = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **{f"APPTAINERENV_{name}": value for name, value in variables(config).items()}}
