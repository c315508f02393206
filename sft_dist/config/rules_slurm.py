"""What must hold in `slurm` and `container`, so that sbatch takes the job and shell and runtime take every value as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sft_dist.config.schema import Config
from sft_dist.config.schema_slurm import SlurmConfig
from sft_dist.config.spelling import Problem, did_you_mean, shown

# Fields whose values stand in the job script's #SBATCH lines.
SBATCH_TEXTS = ("partition", "account", "qos", "mem", "constraint", "exclude", "nodelist", "reservation")
# sbatch of SLURM 20.11 to 25.05, without those that fields of the config or sft-dist itself set.
SBATCH_OPTIONS = frozenset(
    [
        "acctg-freq",
        "batch",
        "bb",
        "bbf",
        "begin",
        "chdir",
        "cluster-constraint",
        "comment",
        "container",
        "container-id",
        "contiguous",
        "core-spec",
        "cores-per-socket",
        "cpu-freq",
        "cpus-per-gpu",
        "deadline",
        "delay-boot",
        "dependency",
        "distribution",
        "exclusive",
        "export",
        "export-file",
        "extra",
        "extra-node-info",
        "get-user-env",
        "gid",
        "gpu-bind",
        "gpu-freq",
        "gres",
        "gres-flags",
        "hint",
        "hold",
        "kill-on-invalid-dep",
        "licenses",
        "mail-type",
        "mail-user",
        "mcs-label",
        "mem-bind",
        "mem-per-cpu",
        "mem-per-gpu",
        "mincpus",
        "network",
        "nice",
        "no-kill",
        "ntasks-per-core",
        "nodefile",
        "oom-kill-step",
        "overcommit",
        "oversubscribe",
        "prefer",
        "priority",
        "profile",
        "propagate",
        "reboot",
        "sockets-per-node",
        "spread-job",
        "stepmgr",
        "switches",
        "thread-spec",
        "threads-per-core",
        "time-min",
        "tmp",
        "tres-bind",
        "tres-per-task",
        "uid",
        "use-min-nodes",
        "wckey",
    ]
)
SET_ELSEWHERE = {
    **{name.replace("_", "-"): f"slurm.{name}" for name in ("partition", "account", "qos", "time", "nodes", "mem")},
    **{name: f"slurm.{name.replace('-', '_')}" for name in ("gpus-per-node", "cpus-per-task", "constraint", "exclude")},
    **{name: f"slurm.{name}" for name in ("nodelist", "reservation")},
    **dict.fromkeys(("gpus", "gpus-per-task", "gpus-per-socket"), "slurm.gpus_per_node"),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu"), "slurm.tasks_per_node"),
    "job-name": "run.name",
    "signal": "slurm.signal_delay_s",
    "no-requeue": "slurm.max_requeues (0)",
    "requeue": "slurm.max_requeues (above 0)",
    "array": "the flag --array of submit",
    "wait": "the flag --wait of submit",
    "test-only": "the flag --dry-run of submit",
}
OURS = ("output", "error", "open-mode", "input", "parsable", "quiet", "verbose", "wrap", "kill-on-bad-exit")
SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|API_?KEY|CREDENTIAL|PRIVATE_?KEY", re.IGNORECASE)
# What a line of shell sets to a text of its own, not to what another command or variable holds.
SETS = re.compile(r"""(?<!\w)(\w+)=["']?[^\s"'$`;&|]""", re.ASCII)
# SLURM's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes(:seconds).
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", re.ASCII)
GPUS = re.compile(r"(?:(?P<kind>[\w.-]+):)?(?P<count>\d+)", re.ASCII)
# The GPUs among what --gres asks for: gpu, gpu:4, gpu:h100:4, gpu:h100:4(S:0).
GRES = re.compile(r"(?:gres[/:])?gpu(?::(?P<kind>[A-Za-z][\w.-]*))?(?::(?P<count>\d+))?(?:\(.*\))?", re.ASCII)
DEFAULT_MINUTES = 60


def slurm_problems(config: Config) -> Iterator[Problem]:
    """Each value that sbatch or the shell would refuse or misread, and what contradicts the rest of the config."""
    for check in (_texts, _amounts, _extra, _environment, _shape, _container):
        yield from check(config)


def minutes(time: str | int | None) -> int | None:
    """The time limit in whole minutes, rounded up; None if the text is none of SLURM's forms."""
    if time is None:
        return DEFAULT_MINUTES
    match = TIME.fullmatch(str(time).strip())
    if match is None:
        return None
    days, first, second, third = (int(match[name] or 0) for name in ("days", "first", "second", "third"))
    if match["days"] is not None:
        seconds = days * 86400 + first * 3600 + second * 60 + third
    elif match["third"] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    return -(-seconds // 60) or None


def gpus_of(slurm: SlurmConfig) -> tuple[str | None, int]:
    """Kind, None if it is not known, and number of a node's GPUs: by gpus_per_node, else by `gres` in `extra`.

    Clusters without SLURM's newer scheduler know only the latter.
    """
    match = GPUS.fullmatch(str(slurm.gpus_per_node)) if slurm.gpus_per_node is not None else None
    if slurm.gpus_per_node is None:
        match = next(filter(None, map(GRES.fullmatch, str(slurm.extra.get("gres", "")).split(","))), None)
    if match is None:
        return slurm.gpu, 0
    return slurm.gpu or match["kind"], int(match["count"] or 1)


def _plain(text: str) -> bool:
    """Whether a line of shell, or of the job script, can hold `text` in quotes: no line breaks, no control characters."""
    return text.isprintable() and bool(text.strip())


def _texts(config: Config) -> Iterator[Problem]:
    slurm = config.slurm
    values = {name: getattr(slurm, name) for name in (*SBATCH_TEXTS, "master_addr", "socket_ifname", "local_scratch")}
    values |= {f"modules[{number}]": module for number, module in enumerate(slurm.modules)}
    for name, value in values.items():
        if value is not None and not _plain(value):
            yield Problem(f"slurm.{name}", f"{shown(value)} is empty, or holds a line break or a control character")
    for number, line in enumerate(slurm.setup):
        if "\0" in line:
            yield Problem(f"slurm.setup[{number}]", "holds a null character")
        if any(SECRET.search(name) for name in SETS.findall(line)):
            text = "sets what looks like a secret, and would be written into files; export it where you type submit"
            yield Problem(f"slurm.setup[{number}]", text)


def _amounts(config: Config) -> Iterator[Problem]:
    slurm = config.slurm
    limit = minutes(slurm.time)
    if limit is None:
        forms = "minutes, HH:MM:SS, D-HH or D-HH:MM:SS"
        yield Problem("slurm.time", f"{shown(slurm.time)} is not a time of SLURM's: {forms}")
    elif slurm.signal_delay_s >= limit * 60:
        text = f"{slurm.signal_delay_s} is not below slurm.time, {limit} minutes: the run would stop as it starts"
        yield Problem("slurm.signal_delay_s", text, ("slurm.time",))
    if slurm.gpus_per_node is not None and GPUS.fullmatch(str(slurm.gpus_per_node)) is None:
        yield Problem("slurm.gpus_per_node", f"{shown(slurm.gpus_per_node)} is neither a number nor KIND:NUMBER")


def _extra(config: Config) -> Iterator[Problem]:
    for name, value in config.slurm.extra.items():
        path, option = f"slurm.extra.{name}", name.strip("-").replace("_", "-")
        if option == "clusters":
            text = "would send the job where status and cancel do not look; export SLURM_CLUSTERS=NAME for all of them"
            yield Problem(path, text)
        elif option in SET_ELSEWHERE:
            yield Problem(path, f"is set by {SET_ELSEWHERE[option]}")
        elif option not in SBATCH_OPTIONS:
            if option in OURS:
                yield Problem(path, "is set by sft-dist and cannot be changed here")
            else:
                yield Problem(path, f"is not an option of sbatch{did_you_mean(option, SBATCH_OPTIONS)}")
        elif not (value is True or isinstance(value, (int, float)) or (isinstance(value, str) and _plain(value))):
            text = "give text or a number, true for an option without a value, false to leave it out"
            yield Problem(path, f"{shown(value)} is no value of an option; {text}")


def _environment(config: Config) -> Iterator[Problem]:
    both = [(f"slurm.env.{name}", name, value) for name, value in config.slurm.env.items()]
    both += [(f"container.env.{name}", name, value) for name, value in config.container.env.items()]
    for path, name, value in both:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII) is None:
            yield Problem(path, "cannot be the name of an environment variable")
        elif SECRET.search(name):
            text = "looks like a secret, and would be written into files; export it where you type submit"
            yield Problem(path, text)
        if "\0" in value:
            yield Problem(path, "holds a null character")


def _shape(config: Config) -> Iterator[Problem]:
    slurm, plan, count = config.slurm, config.parallel.plan, config.parallel.num_processes
    _, gpus = gpus_of(slurm)
    if slurm.nodes > 1 and plan in ("cpu", "single"):
        text = f"{slurm.nodes} contradicts parallel.plan {plan}, which is one process; set parallel.plan=ddp"
        yield Problem("slurm.nodes", text, ("parallel.plan",))
    if gpus and count != "auto" and count > gpus:
        text = f"{count} processes a node, but slurm.gpus_per_node is {gpus}"
        yield Problem("parallel.num_processes", text, ("slurm.gpus_per_node",))


def mount_parts(text: str) -> tuple[str, str, str]:
    """Source, target and mode ("ro", "rw") of one of `container.mounts`; ValueError says what is wrong with it."""
    source, *rest = text.split(":")
    source = str(Path(source).expanduser())
    target, mode = (rest[0] if rest else source), (rest[1] if len(rest) > 1 else "rw")
    if len(rest) > 2 or mode not in ("ro", "rw"):
        raise ValueError("is not PATH, PATH:PATH_INSIDE or PATH:PATH_INSIDE:ro")
    if not (target.startswith("/") and source.startswith("/") and text.isprintable()):
        raise ValueError("needs absolute paths")
    return source, target, mode


def _container(config: Config) -> Iterator[Problem]:
    container = config.container
    if container.runtime != "none" and container.image is None:
        yield Problem("container.image", f"is not set, and runtime is '{container.runtime}'", ("container.runtime",))
    image, workdir = container.image, container.workdir
    if image is not None and (not _plain(image) or image.startswith("-")):
        yield Problem("container.image", f"{shown(image)} is empty, starts with a dash or holds a line break")
    if workdir is not None and not (_plain(workdir) and workdir.startswith("/")):
        yield Problem("container.workdir", f"{shown(workdir)} is not an absolute path")
    for number, text in enumerate(container.mounts):
        try:
            mount_parts(text)
        except ValueError as error:
            yield Problem(f"container.mounts[{number}]", f"{shown(text)} {error}")
