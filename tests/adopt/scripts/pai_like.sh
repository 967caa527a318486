#!/bin/bash
# A made-up script with the habits of Pai-Megatron-Patch's: positional arguments, branches by size, options in strings.
set -e
ENV=$1
SIZE=$2
LR=$3
TP=${4}
PP=${5}
EP=${6}
CHECKPOINT=$7

if [ $ENV = dsw ]; then
    NNODES=1
    GPUS_PER_NODE=8
elif [ $ENV = dlc ]; then
    NNODES=${WORLD_SIZE}
    GPUS_PER_NODE=${KUBERNETES_CONTAINER_RESOURCE_GPU:-8}
fi

if [ $SIZE = A3B ]; then
    # The sizes of moonshotai/Moonlight-16B-A3B's config.json.
    HIDDEN=2048; HEADS=16; LAYERS=27; FFN=11264; EXPERT=1408; SHARED=2; EXPERTS=64; THETA=50000; EPS=1e-5
    moe_options=" \
        --moe-router-topk 6 \
        --moe-router-group-topk 1 --moe-router-num-groups 1 \
        --moe-router-topk-scaling-factor 2.446 \
        --moe-layer-freq '([0]*1+[1]*26)' \
        --moe-shared-expert-intermediate-size $((${EXPERT} * ${SHARED})) \
        --num-experts ${EXPERTS} --moe-ffn-hidden-size ${EXPERT} \
        --moe-router-score-function sigmoid --moe-router-enable-expert-bias \
        --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.001 \
        --expert-model-parallel-size ${EP}"
else
    echo "no such size"; exit 1
fi

if [ -n "$CHECKPOINT" ]; then
    load_option="--load $CHECKPOINT"
fi

TOKENS=1000000000
SEQ_LEN=4096
BATCH=64
ITERS=$(( ${TOKENS} / ${BATCH} / ${SEQ_LEN} ))
NAME="run-${SIZE}-lr-${LR}-it-${ITERS}"

base_options="  \
        --num-layers ${LAYERS} --hidden-size ${HIDDEN} --num-attention-heads ${HEADS} --ffn-hidden-size ${FFN} \
        --seq-length ${SEQ_LEN} --max-position-embeddings 8192 --max-padding-length ${SEQ_LEN} \
        --micro-batch-size 1 --global-batch-size ${BATCH} --train-iters ${ITERS} \
        --lr ${LR} --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 10 --lr-decay-iters ${ITERS} \
        --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} --sequence-parallel \
        --patch-tokenizer-type DeepSeekV2Tokenizer --extra-vocab-size 0 --dataset MMAP --train-mode pretrain \
        --data-path /data/corpus --save /out/${NAME} --save-interval 100 --eval-iters 0 \
        --swiglu --normalization RMSNorm --norm-epsilon ${EPS} --disable-bias-linear --qk-layernorm \
        --position-embedding-type rope --use-rotary-position-embeddings --rotary-base ${THETA} \
        --rotary-scaling-factor 1 --no-rope-fusion --untie-embeddings-and-output-weights \
        --multi-latent-attention --kv-lora-rank 512 --qk-nope-head-dim 128 --qk-rope-head-dim 64 --v-head-dim 128 \
        --use-distributed-optimizer --bf16 --transformer-impl transformer_engine"

run_cmd="torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES ../pretrain_deepseek.py
 ${base_options} ${moe_options} ${load_option}"
echo ${run_cmd}
eval ${run_cmd}
