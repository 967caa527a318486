#!/bin/bash
# R1's pipeline, one recipe after the other, each from the last one's checkpoint (docs/posttrain.md has the published
# constants):
#
#   cold_start   fine-tuning on COLD_START                                       from BASE
#   rl           GRPO on PROMPTS                                                 from cold_start
#   rejection    samples of the model, kept where FILTER holds of their REWARD   by rl
#   sft          fine-tuning on what was kept                                    from rl (SECOND_SFT_FROM=base: from BASE)
#   rl2          GRPO on PROMPTS, at temperature 0.7                             from sft
#
#   examples/r1_pipeline.sh BASE TOKENIZER COLD_START PROMPTS OUT [OVERRIDE ...]
#   DRY_RUN=1 examples/r1_pipeline.sh base tokenizer cold.jsonl prompts.jsonl out model=v3_671b      prints the commands
#
# BASE is a folder of checkpoints, TOKENIZER one with tokenizer.json, COLD_START conversations (docs/sft.md), PROMPTS
# lines of {"prompt": messages, "answer"}. Overrides (model, layout, seq_length) are for every training stage. Variables:
# REWARD, FILTER, SAMPLES (of a prompt), SEQ_LENGTH, MAX_RESPONSE; LAUNCH, how processes are started; SFT, RL, RL2, SAMPLE,
# further words of one kind of stage. The same command goes on where it was interrupted.
# All five stages are run in small by tests/posttrain/test_r1_pipeline.py; not run on GPUs.
set -euo pipefail

USAGE="BASE TOKENIZER COLD_START PROMPTS OUT [OVERRIDE ...]"
BASE=${1:?folder of the base model\'s checkpoints}
TOKENIZER=${2:?folder of the tokenizer}
COLD_START=${3:?file of conversations for the cold start}
PROMPTS=${4:?file of prompts with their answers}
OUT=${5:?folder for the stages}
shift 5

REWARD=${REWARD:-answer=1,format=0.2,language=0.2}
FILTER=${FILTER:-answer>=1}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
MAX_RESPONSE=${MAX_RESPONSE:-1024}
read -ra LAUNCH <<< "${LAUNCH:-torchrun --nproc-per-node 8 -m}"
read -ra SFT <<< "${SFT:-}"
read -ra RL <<< "${RL:-}"
read -ra RL2 <<< "${RL2:-rollout_temperature=0.7}"
read -ra SAMPLE <<< "${SAMPLE:-}"

for given in "$BASE" "$TOKENIZER" "$COLD_START" "$PROMPTS"; do
    # PROMPTS are first read after a whole stage.
    [[ ${DRY_RUN:-0} == 1 || -e $given ]] || { echo "[r1] $given: not there; the arguments are $USAGE" >&2; exit 1; }
done

run() { # FOLDER COMMAND...: once
    local folder=$1
    shift
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
        return
    fi
    [[ -e $folder/done ]] && return
    mkdir -p "$folder"
    echo "[r1] $folder" >&2
    "$@" >> "$folder/log" 2>&1 || {
        tail -n 5 "$folder/log" >&2
        echo "[r1] $folder: failed, its output is in $folder/log; the same command goes on" >&2
        exit 1
    }
    touch "$folder/done"
}

train() { # STAGE FROM OVERRIDE...
    local stage=$OUT/$1 from=$2
    shift 2
    run "$stage" "${LAUNCH[@]}" dsv3_megatron.train_hydra "${OVERRIDES[@]}" "$@" "pretrained_checkpoint=$from" \
        "save=$stage/checkpoints" "load=$stage/checkpoints"
}

finetune() { # STAGE FROM INPUT WORD_OF_DSV3_SFT...
    local stage=$1 from=$2 input=$3
    shift 3
    run "$OUT/$stage/rows" python -m dsv3_megatron sft --input "$input" --tokenizer "$TOKENIZER" \
        --output-dir "$OUT/$stage/rows" --seq-length "$SEQ_LENGTH" "$@"
    train "$stage" "$from" recipe=sft data=sft "sft_data=$OUT/$stage/rows" ${SFT[@]+"${SFT[@]}"}
}

reinforce() { # STAGE FROM OVERRIDE...
    local stage=$1 from=$2
    shift 2
    train "$stage" "$from" recipe=grpo data=prompts "prompt_data=$PROMPTS" "tokenizer_model=$TOKENIZER" \
        "reward='$REWARD'" "seq_length=$SEQ_LENGTH" "max_response_length=$MAX_RESPONSE" ${RL[@]+"${RL[@]}"} "$@"
}

OVERRIDES=(save_interval=50 "$@") # a later one wins
finetune cold_start "$BASE" "$COLD_START"
reinforce rl "$OUT/cold_start/checkpoints"
run "$OUT/rejection" python -m dsv3_megatron sample --load "$OUT/rl/checkpoints" --tokenizer "$TOKENIZER" \
    --prompts "$PROMPTS" --samples "${SAMPLES:-16}" --reward "$REWARD" --filter "$FILTER" \
    --max-new-tokens "$MAX_RESPONSE" --output "$OUT/rejection/kept.jsonl" --json ${SAMPLE[@]+"${SAMPLE[@]}"}
from=$OUT/rl/checkpoints
[[ ${SECOND_SFT_FROM:-rl} == base ]] && from=$BASE
finetune sft "$from" "$OUT/rejection/kept.jsonl" --ignore-key sample response reward parts answer
reinforce rl2 "$OUT/sft/checkpoints" ${RL2[@]+"${RL2[@]}"}
