#!/bin/bash
#SBATCH --job-name=dsv3
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=7-00:00:00
#SBATCH --output=%x-%j.log
# slurm_256gpu.sh through Hydra's groups; further words are overrides.
#
#   sbatch examples/slurm_256gpu_hydra.sh CORPUS_DIR CHECKPOINT_DIR [OVERRIDE ...]
#
# Not run; dry-run in tests/examples (DRY_RUN=1 prints the command of one node,
# PREFLIGHT=1 only checks it).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

export NUM_NODES=32 GPUS_PER_NODE=8 LAYOUT=pp16_ep16 GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-960}
export RUN_ID=${SLURM_JOB_ID:-dsv3}
export MASTER_PORT=${MASTER_PORT:-29500}
if [[ ${DRY_RUN:-0} == 1 || ${PREFLIGHT:-0} == 1 ]]; then
    exec bash examples/pretrain_dsv3_hydra.sh "$@"
fi
# Nothing is started that cannot run: what the job asks for is checked on the first machine, in a minute.
PREFLIGHT=1 bash examples/pretrain_dsv3_hydra.sh "$@"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
exec srun --kill-on-bad-exit=1 bash examples/pretrain_dsv3_hydra.sh "$@"
