#!/usr/bin/env bash
# One node of a job: torchrun with a rank a GPU (RANKS_PER_NODE overrides). srun starts it once a node, with the
# arguments of train.py.
#
# SIGUSR1 (--signal=USR1@180 in the .sbatch files) and SIGTERM (preemption, scancel) must reach the Python ranks, which
# then save and stop. SLURM signals only the process that srun started, this one (all of the step's where a site sets
# SignalChildrenProcesses in cgroup.conf). torchrun would die of SIGUSR1 and, on SIGTERM, kill its ranks after 30 s. So
# this script passes both on to the ranks, which are torchrun's children, past torchrun, which ignores SIGUSR1.
set -u
(
  trap '' USR1  # torchrun and its ranks inherit that; the ranks put their own handlers in its place
  exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_HOST:$RDZV_PORT" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    train.py "$@"
) &
agent=$!
trap 'pkill -USR1 -P "$agent"' USR1
trap 'pkill -TERM -P "$agent"' TERM
while :; do
  wait "$agent"
  code=$?
  kill -0 "$agent" 2>/dev/null || break  # else only a trap interrupted the wait
done
if [ "$code" -gt 128 ]; then  # ended between the trap and the check: its own code is still to be had
  wait "$agent"
  again=$?
  [ "$again" -eq 127 ] || code=$again
fi
exit "$code"
