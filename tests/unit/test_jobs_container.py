"""A run in an image: the command lines, against what the runtimes document, and the way of a signal; stand-ins run them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sft_dist
from sft_dist.config.loader import load_config
from sft_dist.config.resubmit import with_slurm
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.jobs.container import apptainer_exec, docker_run, job_container, mounts
from sft_dist.jobs.container_probe import enter_image, prove_container
from sft_dist.jobs.examples import example_files
from sft_dist.jobs.node import job_environment, refuse_other_version
from sft_dist.jobs.place import Place
from sft_dist.jobs.script import sbatch_options, script_text
from sft_dist.rundir import RunDir
from tests.container_fakes import container_env, make_image

# srun --help with pyxis, github.com/NVIDIA/pyxis args.c (0619349); apptainer exec --help, github.com/apptainer/apptainer
# cmd/internal/cli/action_flags.go (00e9b03). True for those that take a value.
PYXIS = {
    **dict.fromkeys(("container-image", "container-mounts", "container-workdir", "container-env"), True),
    **dict.fromkeys(("no-container-mount-home", "no-container-remap-root"), False),
}
APPTAINER = {"--no-home": False, "--no-eval": False, "--nv": False, "--bind": True, "--pwd": True}
# Prints what it was given, one a line, and what is set.
TELLS = """printf 'word %s\\n' "$@"; env -0 | tr '\\0\\n' '\\n ' | grep -aE '^(A|B|HF_HOME|PYTHON[A-Z]*|SFT_DIST_[A-Z]*)='"""
HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "$HOME",
    "\u00fc \u4f60",
    "*",
    "a,b:c",
]


def config(runtime: str = "apptainer", image: str = "image.sif", slurm: Any = None, **container: Any) -> Config:
    settings = {"runtime": runtime, "image": image, **container}
    return Config.model_validate({"run": {"name": "demo"}, "container": settings, "slurm": slurm or {}})


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in the test's folder, which is the current one, so that one mount is all there is."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))


def test_apptainers_command_line(tmp_path: Path) -> None:
    words = apptainer_exec(config(mounts=("/data:/inside:ro",)), tmp_path / "runs", gpus=2)
    options = ["--no-home", "--no-eval", "--nv", "--bind", f"{tmp_path}:{tmp_path}", "--bind", "/data:/inside:ro"]
    assert words == ["apptainer", "exec", *options, "--pwd", str(tmp_path), f"{tmp_path}/image.sif", "python3"]
    rest = words[2:-2]
    while rest:
        rest = rest[2:] if APPTAINER[rest[0]] else rest[1:]
    assert "--nv" not in apptainer_exec(config(), tmp_path, gpus=0)


def test_pyxis_options(tmp_path: Path) -> None:
    made = job_container(config("pyxis", "nvcr.io#team/sft:1", workdir="/w", mounts=("/d:/e:ro",)), tmp_path / "runs")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in made.srun_args)
    assert {name: bool(value) for name, value in options.items()} == PYXIS
    assert options["container-image"] == "nvcr.io#team/sft:1"
    assert options["container-mounts"] == f"{tmp_path}:{tmp_path},/d:/e:ro"
    assert options["container-workdir"] == "/w"
    assert {"HF_HOME", "SFT_DIST_CACHE", "TRITON_CACHE_DIR"} <= set(options["container-env"].split(","))
    assert made.python == "python3"
    # What starts with . or / is a file for pyxis, and anything else an image of a registry.
    for name in ("x.sqsh", "./x", "~/x"):
        (image, *_) = job_container(config("pyxis", name), tmp_path).srun_args
        assert image.startswith("--container-image=/"), name


def test_dockers_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    words = docker_run(config("docker", "sft-dist:cpu", env={"A": "b c"}, mounts=("/d:/e:ro",)), tmp_path, gpus=1)
    assert words[:2] == ["docker", "run"]
    assert words[-2:] == ["sft-dist:cpu", "python3"]
    # Process 1 would be deaf, files would be root's, and a value would stand in the list of processes.
    assert {"--rm", "--init", "--sig-proxy=true", "--ipc=host", "--gpus=all"} <= set(words)
    pairs = list(itertools.pairwise(words))
    assert ("--user", f"{os.getuid()}:{os.getgid()}") in pairs
    assert ("--mount", f"type=bind,source={tmp_path},target={tmp_path}") in pairs
    assert ("--mount", "type=bind,source=/d,target=/e,readonly") in pairs
    assert {("--env", "HF_TOKEN"), ("--env", "A=b c"), ("--env", f"HF_HOME={tmp_path}/hf")} <= set(pairs)
    assert not any("hf_of_somebody" in word for word in words)
    assert "--tty" not in words, "docker hands on no signals then"
    assert "--ulimit=memlock=-1" in words
    without = docker_run(config("docker", "sft-dist:cpu"), tmp_path, gpus=0)
    assert not any("ulimit" in word or "gpus" in word for word in without), (
        "an engine may not be allowed to lift limits"
    )


def test_what_is_seen_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of each file, once, under the path that it has here; and where a link leads."""
    for name in ("here/runs", "disk/hf", "data", "models/m", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "rows.jsonl").touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "disk" / "hf"))
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "disk"))
    fields = {"model": {"name": "../models/m"}, "data": {"train": {"path": f"{tmp_path}/data/*.jsonl"}}}
    whole = Config.model_validate({**config().model_dump(), **fields})
    seen = mounts(whole, tmp_path / "here" / "link" / "runs")
    expected = ["data", "disk", "elsewhere/runs", "here", "models/m"]
    assert sorted(mount.source for mount in seen) == [str(tmp_path / name) for name in expected]
    assert all(mount.source == mount.target for mount in seen)


@pytest.mark.parametrize("runtime", ["docker", "apptainer", "pyxis"])
def test_a_path_that_would_be_read_as_two_is_refused(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=f"{runtime} cannot mount"):
        mounts(config(runtime), folder)


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
@pytest.mark.parametrize("value", HOSTILE)
def test_values_reach_the_inside_as_they_are(runtime: str, value: str, tmp_path: Path) -> None:
    """The whole batch script, run by bash with stand-ins."""
    pytest.importorskip("submitit")
    image = make_image(tmp_path / ("image" if runtime == "pyxis" else "the image's $(touch pwned)"), TELLS)
    one = config(runtime, str(image), env={"A": value}, slurm={"env": {"B": value}})
    said, _ = ran(one, tmp_path)
    assert f"A={value}" in said
    assert f"B={value}" in said
    assert [line for line in said if line.startswith("word ")][-2:] == [
        "word submitit.core._submit",
        f"word {tmp_path}",
    ]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_the_caches_of_the_host_win_over_the_images(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    said, env = ran(config(runtime, str(make_image(tmp_path / "image", TELLS))), tmp_path, PYTHONPATH="/of/the/host")
    assert f"HF_HOME={tmp_path}/hf" in said
    assert f"SFT_DIST_INSIDE={sft_dist.__version__}" in said
    assert env["PYTHONPATH"] == "/of/the/host"
    assert not any(line.startswith("PYTHONPATH=") for line in said)


def ran(one: Config, folder: Path, **more: str) -> tuple[list[str], Mapping[str, str]]:
    """What the inner Python of the config's batch script says, and the environment in which that script ran."""
    container = job_container(one, folder)
    text = script_text(sbatch_options(one, folder, container=container), folder, container.python)
    env = {**os.environ, **container_env(folder, "apptainer", "srun"), "SLURM_JOB_ID": "7", **more}
    if one.container.runtime == "apptainer":  # an srun that knows nothing of containers
        plain = '#!/bin/bash\nwhile [[ $1 == -* ]]; do case $1 in --output | --error) shift ;; esac; shift; done\nexec "$@"\n'
        (folder / "tools" / "srun").write_text(plain)
    else:
        fake = folder / "tools" / "srun"
        fake.write_text(re.sub(r"^exec .*$", 'exec "${inner[@]}"', fake.read_text(), flags=re.MULTILINE))
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), env


# --- here ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_train_goes_on_inside(runtime: str, tmp_path: Path) -> None:
    words = ["train", "smoke", "run.name=x", "--overwrite", "train.max_steps=3"]
    done = sft(tmp_path, runtime, words, TELLS)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    inner = [line.removeprefix("word ") for line in said if line.startswith("word ")]
    given = [f"container.runtime={runtime}", f"container.image={tmp_path}/image", "container.env={A: '$(x)'}"]
    assert inner == ["-m", "sft_dist", "train", "smoke", "run.name=x", "train.max_steps=3", *given, "--overwrite"]
    assert {"A=$(x)", f"HF_HOME={tmp_path}/hf", f"SFT_DIST_INSIDE={sft_dist.__version__}"} <= set(said)
    assert not any(line.startswith("PYTHONPATH=") for line in said)


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_inside_and_its_exit_status_comes_back(
    runtime: str, number: signal.Signals, tmp_path: Path
) -> None:
    waits = f"""exec {sys.executable} -c 'import signal, sys, time
signal.signal({int(number)}, lambda *_: sys.exit(75))
open("started", "w").close()
while True: time.sleep(0.05)'"""
    process = sft(tmp_path, runtime, ["train", "smoke"], waits, wait=False)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    try:
        assert process.wait(20) == 75
    finally:
        process.terminate()


@pytest.mark.parametrize("runtime", ["none", "docker"])
def test_inside_of_an_image_nothing_is_started_again(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runtime == "docker":
        monkeypatch.setenv("SFT_DIST_INSIDE", "1")
    started: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *words: started.append(words))
    enter_image(config(runtime), ["train", "smoke"], tmp_path)
    assert started == []


def sft(folder: Path, runtime: str, words: list[str], inner: str, *, wait: bool = True, **more: str) -> Any:
    """`sft-dist WORDS` with an image of this runtime; its process, or what became of it."""
    image = make_image(folder / "image", inner)
    fields = [f"container.runtime={runtime}", f"container.image={image}", "container.env={A: '$(x)'}"]
    env = {**os.environ, **container_env(folder, "docker", "apptainer"), **more}
    command = [sys.executable, "-m", "sft_dist", *words, *fields]
    if not wait:
        return subprocess.Popen(command, env=env)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


# --- what is asked before ---------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in container_env(tmp_path, "docker", "apptainer", "srun").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "tools"


def refusal(one: Config, *, job: bool) -> str:
    with pytest.raises((ConfigError, PreflightError)) as caught:
        prove_container(one, job=job)
    return str(caught.value)


def test_what_is_missing_is_said(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = str(make_image(tmp_path / "image"))
    for runtime, job in (("docker", False), ("apptainer", False), ("apptainer", True), ("pyxis", True)):
        prove_container(config(runtime, image), job=job)
    assert "has no part in SLURM" in refusal(config("docker", image), job=True)
    assert "starts only jobs of SLURM" in refusal(config("pyxis", image), job=False)
    assert "is not here" in refusal(config("docker", "nothing:1"), job=False)
    assert f"there is no {tmp_path}/nothing.sif" in refusal(config("apptainer", "nothing.sif"), job=True)
    assert f"there is no {tmp_path}/nothing.sqsh" in refusal(config("pyxis", "nothing.sqsh"), job=True)
    (tools / "srun").write_text("#!/bin/sh\necho 'Usage: srun'\n")
    assert "no --container-image" in refusal(config("pyxis", image), job=True)
    (tools / "docker").write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2; exit 1\n")
    said = refusal(config("docker", image), job=False)
    assert said.startswith("container.runtime is docker, whose engine does not answer: Cannot connect")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no apptainer on this host" in refusal(config("apptainer", image), job=False)
    assert "slurm.modules=[apptainer]" in refusal(config("apptainer", image), job=True)
    prove_container(config("apptainer", image, slurm={"modules": ("apptainer",)}), job=True)


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
@pytest.mark.parametrize(
    ("says", "expected"),
    [("echo 0.0.1", "holds sft-dist 0.0.1"), ("echo No module named sft_dist >&2; exit 1", "No module named sft_dist")],
)
def test_an_image_with_another_package_is_refused(
    tools: Path, tmp_path: Path, runtime: str, says: str, expected: str
) -> None:
    image = make_image(tmp_path / "image")
    (image / "bin" / "python3").write_text(f"#!/bin/sh\n{says}\n")
    assert expected in refusal(config(runtime, str(image)), job=False)


def test_a_job_whose_image_is_another_version_says_so_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(tmp_path).write_status(state="queued")
    place = Place("7", 0, ("n1",), 0, 0, 1, "n1", 20001, str(tmp_path))
    refuse_other_version({}, place)
    refuse_other_version({"package": sft_dist.__version__}, place)
    with pytest.raises(SystemExit) as caught:
        refuse_other_version({"package": "9.9"}, place)
    assert caught.value.code == 3
    assert "submitted with 9.9" in capsys.readouterr().err
    assert RunDir(tmp_path).read_status()["state"] == "failed"


def test_compilers_caches_of_the_image_give_way_to_the_nodes_own(tmp_path: Path) -> None:
    env = {"TRITON_CACHE_DIR": "/of/the/image"}
    spec = {"local_scratch": str(tmp_path)}
    assert "TRITON_CACHE_DIR" not in job_environment(spec, env)
    inside = job_environment({**spec, "image_sets": ["TRITON_CACHE_DIR"]}, env)
    assert inside["TRITON_CACHE_DIR"] == f"{tmp_path}/sft-dist-{os.getuid()}/triton"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("container.runtime=podman", "container.runtime"),
        ("container.runtime=docker", "container.image   is not set"),
        ("container.image=--privileged", "starts with a dash"),
        ("container.workdir=here", "not an absolute path"),
        ("container.mounts=[data]", "needs absolute paths"),
        ("container.mounts=['/a:/b:rx']", "is not PATH"),
        ("container.env={HF_TOKEN: x}", "looks like a secret"),
        ("container.env={A-B: x}", "name of an environment variable"),
    ],
)
def test_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("smoke", [override])
    assert said in str(caught.value)


def test_a_run_can_be_resubmitted_in_another_image() -> None:
    changed = with_slurm(config(), ["container.runtime=pyxis", "container.image=b.sqsh", "slurm.nodes=2"])
    assert (changed.container.runtime, changed.container.image, changed.slurm.nodes) == ("pyxis", "b.sqsh", 2)


def test_without_a_container_the_script_is_as_before(tmp_path: Path) -> None:
    made = job_container(Config(), tmp_path)
    assert (made.python, made.srun_args, made.before, made.after) == (shlex.quote(sys.executable), (), (), ())
    assert json.dumps(Config().container.model_dump())


def test_the_script_to_copy_names_the_same_options() -> None:
    text = example_files()["slurm/container.sbatch"]
    assert set(re.findall(r"--((?:no-)?container-[a-z-]+)", text)) == set(PYXIS)
    (line,) = re.findall(r"^# inside=\(apptainer exec (.*)\)$", text, re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", line)) == set(APPTAINER)
