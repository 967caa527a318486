#!/bin/bash
# The run of pretrain_dsv3.sh through Hydra's groups; further words are overrides (examples: layout=ep32_pp16,
# train_iters=1000).
#
#   examples/pretrain_dsv3_hydra.sh CORPUS_DIR CHECKPOINT_DIR [OVERRIDE ...]     on each node
#   DRY_RUN=1 examples/pretrain_dsv3_hydra.sh corpus checkpoints                 prints the torchrun line of plain arguments
#   PREFLIGHT=1 examples/pretrain_dsv3_hydra.sh corpus checkpoints               checks it, on any machine (docs/preflight.md)
#
# batch_ramp=[3072,768] is DeepSeek-V3's ramp of the batch, for at most 1024 GPUs under DualPipe (docs/recipe.md).
# CORPUS_DIR is what `python -m dsv3_megatron.data.prepare` wrote. Not run on GPUs; dry-run in tests/examples.
set -euo pipefail
# Streams of computation, messages, all-to-all and gradients each want a hardware queue; 1 would forbid the overlap.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
# Routed batches differ in size each step; segments that grow keep the allocator's memory in one piece.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# On machines with several network interfaces: the one that reaches the other machines (ip -br addr), for gloo and for
# NCCL's bootstrap.
[[ -z ${NETWORK_INTERFACE:-} ]] || export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE

CORPUS_DIR=${1:?folder written by dsv3_megatron.data.prepare}
CHECKPOINT_DIR=${2:?folder for checkpoints}
shift 2

OVERRIDES=(
    model=v3_671b
    "layout=${LAYOUT:-pp16_ep64}"
    data=indexed
    "corpus.dir=$CORPUS_DIR"
    "save=$CHECKPOINT_DIR"
    "load=$CHECKPOINT_DIR"
    save_interval=500
    "tensorboard_dir=$CHECKPOINT_DIR/tensorboard"
    log_interval=10
    "global_batch_size=${GLOBAL_BATCH_SIZE:-15360}"
    "$@"
)

if [[ ${DRY_RUN:-0} == 1 ]]; then
    exec python -m dsv3_megatron.train_hydra --cfg command "${OVERRIDES[@]}"
fi
COMMAND=(
    torchrun
    --nnodes "${NUM_NODES:-256}" --nproc-per-node "${GPUS_PER_NODE:-8}"
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-dsv3}" --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}"
    -m dsv3_megatron.train_hydra "${OVERRIDES[@]}"
)
if [[ ${PREFLIGHT:-0} == 1 ]]; then
    exec python -m dsv3_megatron.preflight "${COMMAND[@]}"
fi
exec "${COMMAND[@]}"
