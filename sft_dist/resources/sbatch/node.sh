# What each node does. SLURM_NODEID and SLURM_PROCID are right only in here: outside they are those of this script, 0.
# srun gets its text (declare -f): the file of this script is on the first node only.
# shellcheck disable=SC2317
node() {
  local source=$1 run processes cpus=${SLURM_CPUS_PER_TASK:-1} agent worker status state heard=
  if [ -f "$1/config.yaml" ]; then run=$1; else run=$(python -m sft_dist config "$1" --run-dir) || exit; fi
  # A requeued job goes on with the run that it made.
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$run/config.yaml" ]; then source=$run; fi
  # As many processes as GPUs. On CPUs: sbatch --export=ALL,PROCESSES=2 ...
  processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}"

  # On most clusters a signal reaches this shell alone, on others every process of the node. So it is passed on, and whoever
  # gets it twice must not mind: torchrun (sft_dist.jobs.elastic is torchrun with shorter errors) would end at USR1 and USR2,
  # so it ignores them; the workers finish the step, agree with those on other nodes, save, and end by themselves.
  trap 'heard=yes' TERM USR1 USR2
  (
    trap '' USR1 USR2
    exec python -m sft_dist.jobs.elastic @WHERE@ \
      --nproc-per-node "$processes" -m sft_dist.train "$source"
  ) &
  agent=$!
  # A shell that waits for a command runs no trap until that has ended, except in `wait`.
  while kill -0 "$agent" 2>/dev/null; do
    # Again each second: a worker that has only just started would not have heard it. By the shell's own kill: images have none.
    if [ "$heard" ]; then for worker in $(cat /proc/"$agent"/task/*/children); do kill -USR1 "$worker"; done; fi 2>/dev/null
    sleep 1 &
    wait "$!"
  done
  wait "$agent"
  status=$?

  # Whether it was stopped stands in the run's folder: exit codes do not survive torchrun and srun, and torchrun fails if the
  # signal hits it, too. The first task speaks for all.
  if [ "$status" != 0 ] && [ ! "$heard" ]; then exit "$status"; fi
  if [ "$SLURM_PROCID" != 0 ] || [ -f "$run/model/DONE" ]; then exit 0; fi
  state=$(sed -n 's/^  "state": "\([a-z]*\)".*/\1/p' "$run/status.json" 2>/dev/null)
  if [ "${state:-stopped}" = stopped ]; then # with no state it was asked to stop before there was a run
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ]; then
      printf '%s\n\n' "$run" >"$MARKER"
      exit 0
    fi
    echo "stopped, and not requeued again after $MAX_REQUEUES times; go on with: sbatch FILE $run" >&2
    exit 75
  fi
  exit 1
}
