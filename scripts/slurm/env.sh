# shellcheck shell=bash
# Sourced by the jobs of this folder, in the checkout's root: what is set for a cluster, and how a job runs.
# Edit the first part for yours; docs/cluster.md explains.

# --- the cluster ------------------------------------------------------------------------------------------------
# The Python of the environment that has this project (pip install -c constraints.txt -e '.[train,log]').
export PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
# Load modules here if your site needs them, e.g.: module load cuda

# megatron-core asks for this where tensor parallelism overlaps its communication (GPUs before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# NCCL finds networks by itself. Only if it picks the wrong ones (NCCL_DEBUG=INFO prints what it takes), name them:
#   export NCCL_SOCKET_IFNAME=...   interface of the first contact, as `ip link` lists it
#   export NCCL_IB_HCA=...          InfiniBand adapters, as `ibstat -l` lists them
# The nodes' network card must be reachable for the rendezvous too: all nodes connect to the first one's RDZV_PORT.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# --- a job ------------------------------------------------------------------------------------------------------
# run_job RECIPE [section.key=value ...]: every node runs scripts/slurm/node.sh; a run that a signal stopped is put
# back into the queue, where it resumes. OUTPUT names the run's directory (default runs/RECIPE's name).
run_job() {
  local recipe=${1:?usage: sbatch scripts/slurm/....sbatch configs/RECIPE.yaml [section.key=value ...]} code=0
  shift
  local output=${OUTPUT:-runs/$(basename "$recipe" .yaml)}
  RDZV_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  RDZV_HOST=${RDZV_HOST%%$'\n'*}  # the first; a pipe into head would now and then end the job by its broken end
  RDZV_PORT=${RDZV_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
  export RDZV_HOST RDZV_PORT
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NNODES nodes, rendezvous $RDZV_HOST:$RDZV_PORT"
  rm -f "$output/stopped"  # of the start before; a start that fails early must not be requeued for it
  srun bash scripts/slurm/node.sh --config "$recipe" --output "$output" --resume auto "$@" || code=$?
  if [ -e "$output/stopped" ]; then
    echo "$(cat "$output/stopped"); requeueing"
    scontrol requeue "$SLURM_JOB_ID"
    return 0
  fi
  return "$code"
}
