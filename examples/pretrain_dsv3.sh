#!/bin/bash
# DeepSeek-V3 through a Megatron launch script: ordinary Megatron arguments, and one flag more, --spec dsv3, which fills
# in the model (671B unless sizes are given) and the settings it was trained with. --pipeline-schedule and --fp8-recipe
# are DualPipe and FP8 as published.
#
#   examples/pretrain_dsv3.sh DATA_PREFIX TOKENIZER_DIR CHECKPOINT_DIR      on each node
#   DRY_RUN=1 examples/pretrain_dsv3.sh data tokenizer checkpoints          prints the command
#   PREFLIGHT=1 examples/pretrain_dsv3.sh data tokenizer checkpoints        checks it, on any machine (docs/preflight.md)
#
# NUM_NODES × GPUS_PER_NODE must be a multiple of PP × EP. BATCH_RAMP="3072 768" is DeepSeek-V3's ramp of the batch, for
# at most 1024 GPUs under DualPipe (docs/recipe.md). Not run on GPUs; dry-run in tests/examples.
set -euo pipefail
# Streams of computation, messages, all-to-all and gradients each want a hardware queue; 1 would forbid the overlap.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
# Routed batches differ in size each step; segments that grow keep the allocator's memory in one piece.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# On machines with several network interfaces: the one that reaches the other machines (ip -br addr), for gloo and for
# NCCL's bootstrap.
[[ -z ${NETWORK_INTERFACE:-} ]] || export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE

DATA_PREFIX=${1:?prefix of the .bin and .idx files}
TOKENIZER_DIR=${2:?folder of the tokenizer}
CHECKPOINT_DIR=${3:?folder for checkpoints}

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-256}
PP=${PP:-16}
EP=${EP:-64}
# 4 layers on all stages but the last, which has 1, the MTP layer (m) and the head.
LAYER_LAYOUT=${LAYER_LAYOUT:-'Et*4|(t*4|)*14tmL'}

DISTRIBUTED_ARGS=(
    --nnodes "$NUM_NODES"
    --nproc-per-node "$GPUS_PER_NODE"
    --rdzv-backend c10d
    --rdzv-id "${RUN_ID:-dsv3}"
    --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}"
)
MODEL_ARGS=(
    --spec dsv3
    --padded-vocab-size 129280
)
PARALLEL_ARGS=(
    --pipeline-schedule "${SCHEDULE:-dualpipe}"
    --pipeline-model-parallel-size "$PP"
    --pipeline-model-parallel-layout "$LAYER_LAYOUT"
    --expert-model-parallel-size "$EP"
    --moe-token-dispatcher-type "${DISPATCHER:-two_hop}"   # once per node over InfiniBand (docs/dispatch.md)
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --high-priority-a2a-comm-stream             # the all-to-all does not wait for computation to leave it an SM
)
KERNEL_ARGS=(
    --moe-permute-fusion                        # tokens are sorted by expert in one kernel
    --cross-entropy-loss-fusion                 # else the vocabulary's softmax is kept in fp32
    --manual-gc --manual-gc-interval 100        # all ranks collect Python's garbage at the same step
)
TRAINING_ARGS=(
    --bf16
    --fp8-recipe dsv3
    --global-batch-size "${GLOBAL_BATCH_SIZE:-15360}"
    --train-tokens "${TRAIN_TOKENS:-14.8e12}"   # all schedules go by it (docs/recipe.md)
    --lr 2.2e-4
    --recompute-granularity selective
    --recompute-modules layernorm mla_up_proj
)
read -ra RAMP <<< "${BATCH_RAMP:-}"
[[ ${#RAMP[@]} == 0 ]] || TRAINING_ARGS+=(--batch-ramp "${RAMP[@]}")
DATA_ARGS=(
    --data-path "$DATA_PREFIX"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER_DIR"
    --split 999,1,0
    --num-workers 8                             # a rank reads the microbatches of both directions
)
LOGGING_ARGS=(
    --log-interval 10
    --eval-interval 1000
    --eval-iters 8
    --save-interval 500
    --save "$CHECKPOINT_DIR"
    --load "$CHECKPOINT_DIR"
    --tensorboard-dir "$CHECKPOINT_DIR/tensorboard"
)

COMMAND=(
    torchrun "${DISTRIBUTED_ARGS[@]}" -m dsv3_megatron.train
    "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${KERNEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
elif [[ ${PREFLIGHT:-0} == 1 ]]; then
    exec python -m dsv3_megatron.preflight "${COMMAND[@]}"
else
    exec "${COMMAND[@]}"
fi
