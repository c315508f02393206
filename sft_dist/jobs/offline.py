"""What nodes without a network need: caches that are filled here and found there."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.rundir import RunDir, cache_root

# Where the libraries look for what was fetched. They read these variables once, when they are imported.
CACHES = ("SFT_DIST_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME")
# A host's own by custom, and by their kind: of memory.
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
OWN_KINDS = ("tmpfs", "ramfs")


def take_caches_of_job(config: Config) -> None:
    """Let this process fill the caches that `slurm.env` names for the job.

    Raises ConfigError if the libraries are at work with others already, for an earlier config of the same command.
    """
    named = {name: value for name, value in config.slurm.env.items() if name in CACHES}
    changed = {name: value for name, value in named.items() if os.environ.get(name) != value}
    if changed and "huggingface_hub" in sys.modules:
        raise ConfigError(
            f"slurm.env of {config.run.name} names other caches ({', '.join(changed)}) than the config before it",
            hint="submit them one after the other, each with a command of its own",
        )
    os.environ.update(changed)


def caches() -> dict[str, str]:
    """The caches of this process by their variables, for the job: its environment may not be that of this shell."""
    found = {name: str(Path(os.environ[name]).expanduser().absolute()) for name in CACHES if os.environ.get(name)}
    base = Path(found.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {"HF_HOME": str(base / "huggingface"), **found, "SFT_DIST_CACHE": str(cache_root().absolute())}


def out_of_sight(config: Config, run: RunDir) -> list[str]:
    """What of the run lies where other hosts do not see it: "the cache (/tmp/x)". Nothing on disks that may be shared."""
    mounts = _mounts()
    return [f"{what} ({path})" for what, path in _places(config, run) if _own(path, mounts)]


def _places(config: Config, run: RunDir) -> Iterator[tuple[str, Path]]:
    yield "the run directory", run.path.absolute()
    names = caches()
    yield "SFT_DIST_CACHE", Path(names["SFT_DIST_CACHE"])
    if "/" in config.model.name and not Path(config.model.name).expanduser().is_dir():
        yield "HF_HOME", Path(names.get("HF_HUB_CACHE") or names["HF_HOME"])
    yield from ((field, path) for field, path in named_files(config) if path.exists())
    if config.container.runtime == "none":
        yield "the Python environment", Path(sys.prefix)
    elif (image := Path(str(config.container.image)).expanduser()).exists():
        yield "container.image", image.absolute()


def named_files(config: Config) -> Iterator[tuple[str, Path]]:
    """What the config names that may be files here: "data.train", /data/rows.jsonl. Names of a hub look like files, too."""
    files = {"model.name": config.model.name, "model.tokenizer": config.model.tokenizer}
    for field, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        files |= {f"{field}[{index}]": part.path for index, part in enumerate(source.parts if source else ())}
    for field, name in files.items():
        if name:
            yield field.removesuffix("[0]"), Path(name).expanduser().absolute()


def _own(path: Path, mounts: dict[Path, str]) -> bool:
    """Whether `path` is below a folder, or on a file system, that is a host's own."""
    whole = path.resolve()
    parents = [whole, *whole.parents]
    if any(Path(folder).resolve() in parents for folder in (*OWN_FOLDERS, tempfile.gettempdir())):
        return True
    return next((mounts[parent] in OWN_KINDS for parent in parents if parent in mounts), False)


def _mounts() -> dict[Path, str]:
    """Mount point -> kind of file system; {} where there is no /proc."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields = [line.split(" ") for line in lines]
    return {Path(field[1].replace("\\040", " ")): field[2] for field in fields if len(field) > 2}
