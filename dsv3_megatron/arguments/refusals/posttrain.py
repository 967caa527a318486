"""What post-training needs, and what cannot be combined with it."""

from argparse import Namespace
from pathlib import Path

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.posttrain.arguments import report_of

FEATURE = "Post-training"
METHOD = "--posttrain"
DPO = "--posttrain dpo --preference-data nowhere"
GRPO = "--posttrain grpo --prompt-data nowhere --reward answer"


def _on(a: Namespace) -> bool:
    return a.posttrain is not None


def _dpo(a: Namespace) -> bool:
    return a.posttrain == "dpo"


def _grpo(a: Namespace) -> bool:
    return a.posttrain == "grpo"


def _has_checkpoint(a: Namespace) -> bool:
    tracker = "latest_checkpointed_iteration.txt"
    return any(f is not None and (Path(f) / tracker).is_file() for f in (a.load, a.pretrained_checkpoint))


ROWS = (
    Refusal(
        "posttrain_data_without_method",
        FEATURE,
        "--preference-data, --prompt-data",
        "",
        lambda a, s: not _on(a) and (a.preference_data is not None or a.prompt_data is not None),
        "data for post-training, and no post-training",
        f"{METHOD} dpo or {METHOD} grpo with them",
        "--preference-data nowhere",
    ),
    Refusal(
        "preference_folder",
        FEATURE,
        "--preference-data",
        "{preference_data}",
        lambda a, s: _dpo(a) and report_of(a) is None,
        "there are no packed pairs (or their preparation was interrupted)",
        "a folder by dsv3 preferences",
        DPO,
    ),
    Refusal(
        "grpo_prompts",
        FEATURE,
        "--prompt-data",
        "{prompt_data}",
        lambda a, s: _grpo(a) and (a.prompt_data is None or not Path(a.prompt_data).is_file()),
        "there are no prompts to answer",
        "a file with a prompt and its answer in each line",
        GRPO,
    ),
    Refusal(
        "grpo_reward",
        FEATURE,
        "--reward",
        "",
        lambda a, s: _grpo(a) and a.reward is None,
        "nothing says what a response is worth",
        "--reward MODULE:FUNCTION, reward(prompt, response, answer) -> float, or a shipped one (docs/rewards.md)",
        "--posttrain grpo --prompt-data nowhere",
    ),
    Refusal(
        "posttrain_other_data",
        FEATURE,
        METHOD,
        "{posttrain}",
        lambda a, s: _on(a) and bool(a.mock_data or a.data_path or a.train_data_path or a.sft_data),
        "data for pre-training or fine-tuning was given as well",
        "one of the two",
        DPO,
    ),
    Refusal(
        "posttrain_both_data",
        FEATURE,
        METHOD,
        "{posttrain}",
        lambda a, s: (_dpo(a) and a.prompt_data is not None) or (_grpo(a) and a.preference_data is not None),
        "dpo reads --preference-data, grpo reads --prompt-data, and the other one was given",
        "the one that belongs to it",
        GRPO + " --preference-data nowhere",
    ),
    Refusal(
        "posttrain_without_checkpoint",
        FEATURE,
        METHOD,
        "{posttrain}",
        lambda a, s: _on(a) and not _has_checkpoint(a),
        "post-training begins with a checkpoint, and there is none in --load or --pretrained-checkpoint",
        "--pretrained-checkpoint DIR (and --load for where this run saves, to go on after an interruption)",
        DPO,
    ),
    Refusal(
        "grpo_fp8",
        FEATURE,
        "--fp8-format",
        "{fp8}",
        lambda a, s: _grpo(a) and bool(a.fp8),
        "the engine that makes the rollouts runs in bf16 or fp32, and would not be the model that is trained",
        "--bf16 without --fp8-format",
        GRPO + " --bf16 --fp8-format e4m3",
    ),
    Refusal(
        "posttrain_moving_experts",
        FEATURE,
        "--expert-placement",
        "{expert_placement}",
        lambda a, s: _on(a) and a.expert_placement != "fixed",
        "experts that move leave the reference model and the rollouts' copy of the weights behind",
        "--expert-placement fixed",
        DPO + " --expert-placement balanced",
    ),
    Refusal(
        "posttrain_context_parallel",
        FEATURE,
        "--context-parallel-size",
        "{context_parallel_size}",
        lambda a, s: _on(a) and a.context_parallel_size > 1,
        f"{METHOD} packs samples of any length, which cannot be cut into equal chunks for each rank",
        "1",
        DPO + " --context-parallel-size 2",
    ),
    Refusal(
        "dpo_ipo_smoothing",
        FEATURE,
        "--dpo-label-smoothing",
        "{dpo_label_smoothing}",
        lambda a, s: _dpo(a) and a.dpo_loss == "ipo" and a.dpo_label_smoothing != 0,
        "--dpo-loss ipo has none",
        "0, or --dpo-loss sigmoid",
        DPO + " --dpo-loss ipo --dpo-label-smoothing 0.1",
    ),
    Refusal(
        "posttrain_mtp_loss_without_layer",
        FEATURE,
        "--posttrain-mtp-loss",
        "",
        lambda a, s: _on(a) and a.posttrain_mtp_loss and not a.mtp_num_layers,
        "there is no MTP layer to learn",
        "--no-posttrain-mtp-loss, or --mtp-num-layers 1 with a checkpoint that has it",
        DPO + " --posttrain-mtp-loss --mtp-num-layers 0",
    ),
    Refusal(
        "dpo_live_evaluation",
        FEATURE,
        "--dpo-reference",
        "live",
        lambda a, s: _dpo(a) and a.dpo_reference == "live" and bool(a.eval_iters),
        "evaluation (--eval-iters {eval_iters}) has no reference then",
        "--dpo-reference cached, or --eval-iters 0",
        DPO + " --dpo-reference live --eval-iters 1",
    ),
    Refusal(
        "routing_replay_tensor_parallel",
        FEATURE,
        "--routing-replay",
        "",
        lambda a, s: _grpo(a) and a.routing_replay and a.tensor_model_parallel_size > 1,
        "with --tensor-model-parallel-size {tensor_model_parallel_size} a rank's router sees a part of the tokens",
        "--tensor-model-parallel-size 1",
        GRPO + " --routing-replay --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    Refusal(
        "grpo_interleaved",
        FEATURE,
        METHOD,
        "grpo",
        lambda a, s: (
            _grpo(a)
            and bool(a.num_virtual_stages_per_pipeline_rank or a.num_layers_per_virtual_pipeline_stage)
        ),
        "the engine's copy of the model cannot be built beside Megatron's interleaved stages",
        "--pipeline-schedule 1f1b, zb1p, dualpipe, dualpipev or zigzag without virtual stages",
        GRPO + " --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    ),
    Refusal(
        "routing_replay_rollout_ranks",
        FEATURE,
        "--routing-replay",
        "",
        lambda a, s: _grpo(a) and a.routing_replay and a.rollout_address is not None,
        "with --rollout-address {rollout_address} the engine is another job's, whose routes do not come here",
        "rollouts by the trainer's own ranks, without --rollout-address",
        GRPO + " --routing-replay --rollout-address host:29600",
    ),
    Refusal(
        "routing_replay_plans",
        FEATURE,
        "--routing-replay",
        "",
        lambda a, s: (
            _grpo(a)
            and a.routing_replay
            and (a.pipeline_schedule != "1f1b" and a.expert_model_parallel_size > 1 and not a.mtp_num_layers)
        ),
        "under --pipeline-schedule {pipeline_schedule} with expert parallelism and without MTP two microbatches pass a "
        "layer at once",
        "--pipeline-schedule 1f1b, or an MTP layer",
        GRPO + " --routing-replay --pipeline-schedule zb1p --pipeline-model-parallel-size 2 "
        "--expert-model-parallel-size 2 --mtp-num-layers 0",
    ),
    Refusal(
        "routing_replay_recompute",
        FEATURE,
        "--routing-replay",
        "",
        lambda a, s: (
            _grpo(a)
            and a.routing_replay
            and (
                a.recompute_granularity == "full"
                or (a.recompute_granularity == "selective" and "moe" in (a.recompute_modules or []))
            )
        ),
        "a layer that is computed again in the backward pass would choose experts anew",
        "--recompute-granularity selective without moe among --recompute-modules",
        GRPO
        + " --routing-replay --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Refusal(
        "grpo_evaluation",
        FEATURE,
        "--eval-iters",
        "{eval_iters}",
        lambda a, s: _grpo(a) and bool(a.eval_iters),
        f"{METHOD} grpo has no held-out loss; its rewards are in the journal",
        "0",
        GRPO + " --eval-iters 1",
    ),
    Refusal(
        "posttrain_batch_ramp",
        FEATURE,
        METHOD,
        "{posttrain}",
        lambda a, s: _on(a) and (a.train_tokens is not None or a.rampup_batch_size is not None),
        "the schedules of pre-training (--train-tokens, a batch ramp) do not apply",
        "--train-iters and --lr-decay-style",
        DPO + " --train-tokens 1e9",
    ),
)
