#!/bin/bash
#SBATCH --ntasks-per-node 1 --gpus-per-node 8 --exclusive --time 24:00:00 --signal USR1@600 --output slurm-%x-%j.log
#
# A recipe on the machines of a SLURM job:
#
#     BENCH=benchmarks sbatch --nodes 4 recipes/slurm.sh recipes/tulu3_70b.sh sft dpo
#
# The recipe runs on the job's first machine, commands for GPUs on all of them, one torchrun on each. Ten minutes before
# the job's end SLURM sends SIGUSR1; what is running saves and ends, and the same job is queued again, to go on from
# there. A job that fails within its first hour ($RESTART_AFTER seconds) is not: more time would not help it.

set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -eq 0 ]; then
    echo "usage: sbatch --nodes N recipes/slurm.sh recipes/RECIPE.sh [STAGE ...], with what the recipe needs set" >&2
    exit 1
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
export LAUNCH="srun torchrun --nnodes $SLURM_NNODES --nproc_per_node ${SLURM_GPUS_ON_NODE:-8}"
LAUNCH+=" --rdzv_backend c10d --rdzv_endpoint $head:29500 --rdzv_id $SLURM_JOB_ID"
LAUNCH+=" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 540"

code=0
bash "$@" || code=$?
if [ "$code" -ne 0 ] && [ "$SECONDS" -ge "${RESTART_AFTER:-3600}" ]; then
    sbatch --nodes "$SLURM_NNODES" "$0" "$@"
fi
exit "$code"
