#!/usr/bin/env bash
# What docs/containers.md promises of the cpu image, tried with a real engine: `make image-test`.
#
#     IMAGE_ARGS="..." docker/test-image.sh [STEP...]      steps: build tests demo stop train; all of them if none is named
#
# IMAGE_ARGS are words for `docker build`, as for `make image`. SFT_DIST names the host's own sft-dist for the last step, which
# is left out without one. Needs bash, docker with BuildKit, and a few GB of disk; leaves the images, and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export DOCKER_BUILDKIT=1
image=${IMAGE:-sft-dist:cpu}
test_image=${TEST_IMAGE:-sft-dist:test}
sft_dist=${SFT_DIST:-$(command -v sft-dist || true)}
# All of `make test` that one process does. Not the plans of several: DeepSpeed compiles for CPUs, and finds no compiler in this image.
tests=(tests/unit tests/cpu)
steps=("$@")
if ((${#steps[@]} == 0)); then steps=(build tests demo stop train); fi
work=$(mktemp -d)
# Somebody who has no name in the image, no home, and can write nowhere but here and in /tmp.
uid=4242:4242
chmod 777 "$work"
began=$SECONDS
# shellcheck disable=SC2054 # the commas are docker's
stranger=(--user "$uid" --read-only --tmpfs /tmp:exec,mode=1777 --network none --init
  --mount "type=bind,source=$work,target=/workspace" --env SFT_DIST_CACHE=/workspace/cache
  --mount "type=bind,source=$PWD/docker,target=/docker,readonly")

finish() {
  local status=$?
  docker rm --force sft-dist-stop >/dev/null 2>&1 || true
  docker run --rm --user 0 --mount "type=bind,source=$work,target=/gone" "$image" \
    find /gone -mindepth 1 -delete >/dev/null 2>&1 || true
  rm -rf "$work"
  if ((status != 0)); then echo "FAILED after $((SECONDS - began)) s" >&2; fi
}
trap finish EXIT

inside() { docker run --rm "${stranger[@]}" "$image" "$@"; }
passed() { printf 'passed  %-44s %4d s\n' "$1" $((SECONDS - step_began)); }

build() {
  local words=()
  read -r -a words <<<"${IMAGE_ARGS:-}"
  words+=(--build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' sft_dist/__init__.py)")
  words+=(--build-arg "COMMIT=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
  docker build --file docker/Dockerfile --target cpu --tag "$image" "${words[@]}" .
  docker build --file docker/Dockerfile --target test --tag "$test_image" "${words[@]}" .
  docker image inspect --format 'labels  {{json .Config.Labels}}' "$image"
  docker history --no-trunc "$image" | grep -iE 'secret=|token|password' && return 1
  docker image inspect --format '{{.Size}}' "$image" | awk '{printf "size    %.2f GB, unpacked\n", $1 / 1e9}'
  passed "build"
}

tests() {
  # With a network: without one processes do not find each other by the container's name. The test that is left out asks
  # for a checkout, and the package is installed here.
  docker run --rm --init --user "$uid" --tmpfs /tmp:exec,mode=1777 --env HOME=/tmp --env OMP_NUM_THREADS=1 \
    "$test_image" python -m pytest -q -p no:cacheprovider -n "${JOBS:-2}" --dist loadfile "${tests[@]}" \
    --deselect tests/unit/test_refs.py::test_the_light_step_does_not_import_trl
  passed "${tests[*]}"
}

demo() {
  inside sft-dist train demo
  inside python /docker/check_runs.py demo
  passed "demo, as uid $uid, read-only root"
}

# wait_for_steps RUN COMMAND...: until the run has gone some steps; fails once COMMAND does, since the run has ended then.
wait_for_steps() {
  until [ "$(grep -c '"loss"' "$work/runs/$1/metrics.jsonl" 2>/dev/null || true)" -ge 20 ] 2>/dev/null; do
    if ! "${@:2}"; then echo "it ended before step 20" >&2; return 1; fi
    sleep 0.2
  done
}

long=(train.max_steps=300 train.eval_strategy=no data.eval_size=0 evaluate.before=false evaluate.after=false
  evaluate.data=null 'evaluate.labels=[]' checkpoint.save_strategy=no parallel.plan=cpu)

whole() {
  if [ ! -e "$work/runs/whole/model/DONE" ]; then
    inside sft-dist train smoke run.name=whole "${long[@]}"
  fi
}

is_up() { [ "$(docker inspect --format '{{.State.Running}}' sft-dist-stop)" = true ]; }

stop() {
  whole
  docker run --detach --name sft-dist-stop "${stranger[@]}" "$image" sft-dist train smoke run.name=stopped "${long[@]}" >/dev/null
  wait_for_steps stopped is_up
  docker stop --time 120 sft-dist-stop >/dev/null
  local status
  status=$(docker inspect --format '{{.State.ExitCode}}' sft-dist-stop)
  echo "docker stop: exit status $status"
  docker rm sft-dist-stop >/dev/null
  [ "$status" = 75 ]
  inside sft-dist resume stopped
  inside python /docker/check_runs.py same stopped
  passed "docker stop, resume"
}

# The section container: sft-dist outside starts the image, and hands on the signal.
train() {
  if [ -z "$sft_dist" ]; then echo "left out: there is no sft-dist on this host"; return; fi
  whole
  local container=("container.runtime=docker" "container.image=$image") pid status=0
  export SFT_DIST_CACHE=$work/cache-outside HF_HOME=$work/hf
  (cd "$work" && exec "$sft_dist" train smoke run.name=outside "${long[@]}" "${container[@]}") &
  pid=$!
  wait_for_steps outside kill -0 "$pid"
  kill -TERM "$pid"
  wait "$pid" || status=$?
  echo "SIGTERM to sft-dist train: exit status $status"
  [ "$status" = 75 ]
  (cd "$work" && "$sft_dist" resume outside)
  inside python /docker/check_runs.py same outside
  passed "container.runtime=docker, SIGTERM, resume"
}

for step in "${steps[@]}"; do
  case $step in build | tests | demo | stop | train) ;; *) echo "no step $step" >&2; exit 2 ;; esac
  step_began=$SECONDS
  printf '\n== %s\n' "$step"
  "$step"
done
printf '\nall passed after %d s\n' $((SECONDS - began))
