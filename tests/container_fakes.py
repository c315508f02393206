"""Stand-ins for docker, apptainer and srun with pyxis, which start the inner command as those do: options, variables, signals.

An image is a folder with bin/python3 in it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import sft_dist

PACKAGE_ROOT = Path(sft_dist.__file__).parents[1]

# As apptainer does, it stays beside the command and forwards signals; so does docker with --sig-proxy, through --init.
RUNTIME = """\
import json, os, signal, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["CONTAINER_CALLS"], "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if words[:2] == ["image", "inspect"]:
    sys.exit(0 if os.path.isdir(words[-1]) else "Error response from daemon: No such image: " + words[-1])
verb, words = words[0], words[1:]
assert (name, verb) in (("docker", "run"), ("apptainer", "exec")), verb
TAKES = {"--bind", "--pwd", "--mount", "--env", "--workdir", "--user", "--ulimit"}
env = {} if name == "docker" else dict(os.environ)
kept = {key: os.environ[key] for key in ("CONTAINER_CALLS", "INNER") if key in os.environ}
while words[0].startswith("-"):
    option, equals, value = words.pop(0).partition("=")
    if option in TAKES and not equals:
        value = words.pop(0)
    if option in ("--pwd", "--workdir"):
        os.chdir(value)
    if option == "--env":
        key, equals, text = value.partition("=")
        env[key] = text if equals else os.environ[key]
for key in [key for key in env if key.startswith("APPTAINERENV_")]:
    env[key.removeprefix("APPTAINERENV_")] = env.pop(key)
image = words.pop(0)
if not os.path.isdir(image):
    sys.exit("FATAL: could not open image " + image)
env = {**kept, **env, "PATH": image + "/bin:/usr/bin:/bin"}
inner = subprocess.Popen(words, env=env, start_new_session=True, executable=image + "/bin/" + words[0])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: inner.send_signal(number))
status = inner.wait()
sys.exit(status if status >= 0 else 128 - status)
"""
# As pyxis: variables of the image win over those of the host, but for the ones that --container-env names.
SRUN = """\
#!/bin/bash
if [ "$1" = --help ]; then echo "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"; exit; fi
for word in "$@"; do printf '%s\\0' "$word"; done >>"$CONTAINER_CALLS.srun"
rest=()
while [[ $1 == -* ]]; do
  case $1 in
    --container-image=*) image=${1#*=} ;;
    --container-workdir=*) cd "${1#*=}" || exit ;;
    --container-env=*) names=${1#*=} ;;
    --container-mounts=* | --no-container-mount-home | --no-container-remap-root) ;;
    --output | --error) rest+=("$1" "$2"); shift ;;
    *) rest+=("$1") ;;
  esac
  shift
done
[ -d "$image" ] || { echo "pyxis: no image $image" >&2; exit 1; }
case ,$names, in *,HF_HOME,*) ;; *) export HF_HOME=/of/the/image ;; esac
inner=(env "PATH=$image/bin:/usr/bin:/bin" "$image/bin/$1" "${@:2}")
@START@
"""


def make_image(folder: Path, inner: str = "") -> Path:
    """An image whose python3 is the tests' own with this checkout's package, or the shell text `inner`."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python3"
    ours = f'export PYTHONPATH={shlex.quote(str(PACKAGE_ROOT))}\nexec {shlex.quote(sys.executable)} "$@"'
    # The question for the version comes with -I, which reads no PYTHONPATH.
    asked = f'[ "$1" = -I ] && {{ echo {sft_dist.__version__}; exit; }}'
    python.write_text(f"#!/bin/bash\n{asked}\n{inner or ours}\n")
    python.chmod(0o755)
    return folder


def make_runtimes(folder: Path, *names: str) -> Path:
    """A folder for PATH with these stand-ins: docker, apptainer, srun (in front of a real one, if there is one)."""
    folder.mkdir(parents=True, exist_ok=True)
    real = shutil.which("srun")
    for name in names:
        path = folder / name
        if name == "srun":
            start = f'exec {shlex.quote(real)} "${{rest[@]}}" "${{inner[@]}}"' if real else 'exec "${inner[@]}"'
            path.write_text(SRUN.replace("@START@", start))
        else:
            path.write_text(f"#!{sys.executable} -IS\n{RUNTIME}")
        path.chmod(0o755)
    return folder


def container_env(folder: Path, *names: str) -> dict[str, str]:
    """The environment in which `names` are found first; what they were asked for goes to folder/calls, JSON lines."""
    tools = make_runtimes(folder / "tools", *names)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "CONTAINER_CALLS": str(folder / "calls")}
