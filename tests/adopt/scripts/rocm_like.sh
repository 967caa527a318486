#!/usr/bin/env bash
# A made-up script with the habits of ROCm's Megatron-LM: arrays of options, everything from the environment.
MODEL_DIR="${MODEL_DIR:-/models/v3}"
TP="${TP:-1}"
PP="${PP:-8}"
EP="${EP:-8}"
MBS="${MBS:-1}"
GBS="${GBS:-256}"
SEQ="${SEQ:-4096}"
ITERS="${ITERS:-100}"
NNODES="${NNODES:-8}"
GPUS="${GPUS:-8}"
FP8="${FP8:-0}"

DISTRIBUTED_ARGS=(
    --nproc_per_node "$GPUS"
    --nnodes "$NNODES"
)
MODEL_ARGS=(
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
    --seq-length "$SEQ" --max-position-embeddings 163840
    --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128 --qk-layernorm
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --position-embedding-type rope
    --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0   # YaRN: MLA's default in Megatron
    --use-turbo-attention
)
MOE_ARGS=(
    --num-experts 256 --moe-layer-freq "([0]*3+[1]*58)" --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048 --enable-shared-expert
    --moe-router-topk 8 --moe-router-num-groups 8 --moe-router-group-topk 4
    --moe-router-topk-scaling-factor 2.5 --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-pre-softmax --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-use-legacy-grouped-gemm
)
TRAIN_ARGS=(
    --micro-batch-size "$MBS" --global-batch-size "$GBS" --train-iters "$ITERS"
    --lr 2.2e-4 --lr-decay-style constant --bf16 --use-distributed-optimizer --eval-iters 0
    --tokenizer-type DeepSeekV3Tokenizer --tokenizer-model "${MODEL_DIR}"
    --data-path "$DATA_PREFIX"
)
if [[ "$FP8" == "1" ]]; then
    TRAIN_ARGS+=(--fp8-format hybrid --fp8-recipe delayed)
fi
case "$RECOMPUTE" in
    full) TRAIN_ARGS+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
    *) ;;
esac

torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \
    "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${TRAIN_ARGS[@]}" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --expert-model-parallel-size "$EP" --decoder-last-pipeline-num-layers 5
