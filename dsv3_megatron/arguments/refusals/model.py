"""Sizes that contradict each other, and Megatron options that DeepSeek-V3's layers would silently ignore."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal

ROUTING, ROPE, MTP = "Routing", "Positions", "Multi-token prediction"


def _pattern(a: Namespace) -> list[int]:
    """1 for each MoE layer, 0 for each dense one; an integer N means one MoE layer in N, as in Megatron."""
    if isinstance(a.moe_layer_freq, int):
        if a.moe_layer_freq < 1:
            return [0] * a.num_layers
        return [int(i % a.moe_layer_freq == 0) for i in range(a.num_layers)]
    return list(a.moe_layer_freq)


def _grouped(a: Namespace) -> bool:
    return bool(a.moe_router_num_groups) and a.num_experts % a.moe_router_num_groups == 0


ROWS = (
    Refusal(
        "no_moe",
        ROUTING,
        "--moe-layer-freq",
        "{moe_layer_freq}",
        lambda a, s: not any(_pattern(a)),
        "makes every layer dense; left out, the first three of --num-layers {num_layers} are",
        '"[0]*1+[1]*N" with N MoE layers after one dense layer, or more layers',
        "--num-layers 2 --moe-layer-freq [0]*2",
    ),
    Refusal(
        "moe_pattern_length",
        ROUTING,
        "--moe-layer-freq",
        "{moe_layer_freq}",
        lambda a, s: len(_pattern(a)) != a.num_layers,
        "does not have one entry for each of --num-layers {num_layers}",
        "a pattern of {num_layers} entries, 0 for dense and 1 for MoE",
        "--moe-layer-freq [0]*1+[1]*4",
    ),
    Refusal(
        "pre_softmax_of_sigmoid",
        ROUTING,
        "--moe-router-pre-softmax",
        "",
        lambda a, s: a.moe_router_pre_softmax and a.moe_router_score_function == "sigmoid",
        "is ignored by sigmoid scores, which are DeepSeek-V3's",
        "the line without it; with --moe-router-score-function softmax it is V2-Lite's gate, another model",
        "--moe-router-pre-softmax --moe-router-score-function sigmoid",
    ),
    Refusal(
        "experts_over_groups",
        ROUTING,
        "--moe-router-num-groups",
        "{moe_router_num_groups}",
        lambda a, s: not _grouped(a),
        "does not divide --num-experts {num_experts}",
        "a divisor of {num_experts}",
        "--moe-router-num-groups 3 --moe-router-group-topk 2",
    ),
    Refusal(
        "group_of_one",
        ROUTING,
        "--moe-router-num-groups",
        "{moe_router_num_groups}",
        lambda a, s: _grouped(a) and a.num_experts // a.moe_router_num_groups < 2,
        "leaves fewer than two experts in a group, and a group's score is the sum of its two best (R§2.1.2)",
        "at most half of --num-experts {num_experts}",
        "--moe-router-num-groups 8 --moe-router-group-topk 4",
    ),
    Refusal(
        "groups_per_token",
        ROUTING,
        "--moe-router-group-topk",
        "{moe_router_group_topk}",
        lambda a, s: a.moe_router_group_topk > a.moe_router_num_groups,
        "is more than --moe-router-num-groups {moe_router_num_groups}",
        "at most {moe_router_num_groups}",
        "--moe-router-num-groups 2 --moe-router-group-topk 3",
    ),
    Refusal(
        "topk_over_groups",
        ROUTING,
        "--moe-router-topk",
        "{moe_router_topk}",
        lambda a, s: (
            _grouped(a)
            and a.moe_router_topk > a.num_experts // a.moe_router_num_groups * a.moe_router_group_topk
        ),
        "is more than the experts in --moe-router-group-topk {moe_router_group_topk} of "
        "{moe_router_num_groups} groups of --num-experts {num_experts}",
        "fewer experts per token or more groups per token",
        "--moe-router-topk 5",
    ),
    Refusal(
        "softmax_groups",
        ROUTING,
        "--moe-router-num-groups",
        "{moe_router_num_groups}",
        lambda a, s: a.moe_router_score_function == "softmax" and (a.moe_router_num_groups or 1) > 1,
        "DeepSeek-V2 scores a group by its best expert, which Megatron's router does not, and --moe-router-pre-softmax "
        "asks for V2's gate",
        "1 (as V2-Lite), or no --moe-router-pre-softmax for V3's gate",
        "--moe-router-pre-softmax",
    ),
    Refusal(
        "softmax_bias",
        ROUTING,
        "--moe-router-enable-expert-bias",
        "",
        lambda a, s: a.moe_router_score_function == "softmax" and a.moe_router_enable_expert_bias,
        "the gate of --moe-router-pre-softmax, DeepSeek-V2's, has no bias",
        "neither, or no --moe-router-pre-softmax for V3's gate",
        "--moe-router-pre-softmax --moe-router-num-groups 1 --moe-router-group-topk 1 --moe-router-enable-expert-bias",
    ),
    Refusal(
        "yarn_options",
        ROPE,
        "--yarn-original-max-position-embeddings / --yarn-beta-fast / --yarn-beta-slow / "
        "--no-yarn-correction-range-round-to-int",
        "{yarn_original_max_position_embeddings} / {yarn_beta_fast} / {yarn_beta_slow} / "
        "{yarn_correction_range_round_to_int}",
        lambda a, s: (
            any(
                x is not None
                for x in (a.yarn_original_max_position_embeddings, a.yarn_beta_fast, a.yarn_beta_slow)
            )
            or a.yarn_correction_range_round_to_int is False
        ),
        "Megatron's MLA ignores these options; it has DeepSeek-V3's values (4096, 32, 1) already",
        "--original-max-position-embeddings, --beta-fast and --beta-slow where other values are meant",
        "--rope-type yarn --yarn-beta-fast 16",
    ),
    Refusal(
        "scaling_without_yarn",
        ROPE,
        "--rotary-scaling-factor",
        "{rotary_scaling_factor}",
        lambda a, s: a.rope_type != "yarn" and a.rotary_scaling_factor != 1.0,
        "without YaRN it changes the softmax scale only, which Megatron's MLA multiplies by mscale² "
        "whatever the rope type",
        "--rope-type yarn as well for the long context, or leave it out before",
        "--rotary-scaling-factor 40",
    ),
    Refusal(
        "reset_position_ids",
        ROPE,
        "--reset-position-ids",
        "",
        lambda a, s: a.reset_position_ids,
        "rotary embeddings count positions inside the sample and ignore position ids",
        "--dataloader-inter-document-masking, which restarts them with each document",
        "--reset-position-ids",
    ),
    Refusal(
        "reset_attention_mask",
        "Data",
        "--reset-attention-mask",
        "",
        lambda a, s: a.reset_attention_mask,
        "causal attention is computed without a mask tensor, which would be ignored",
        "--dataloader-inter-document-masking (DeepSeek-V3 itself packed without it, R§4.1)",
        "--reset-attention-mask",
    ),
    Refusal(
        "no_position_embedding",
        ROPE,
        "--no-position-embedding",
        "",
        lambda a, s: not a.add_position_embedding,
        "is a deprecated way to ask for no learned positions",
        "--position-embedding-type rope, which is filled in anyway",
        "--no-position-embedding",
    ),
    Refusal(
        "hybrid_model",
        "Model",
        "--hybrid-layer-pattern / --hybrid-override-pattern / --is-hybrid-model",
        "{hybrid_layer_pattern} / {hybrid_override_pattern} / {is_hybrid_model}",
        lambda a, s: bool(a.hybrid_layer_pattern or a.hybrid_override_pattern or a.is_hybrid_model),
        "describes another model",
        "--num-layers and --moe-layer-freq",
        "--hybrid-layer-pattern M*M*",
    ),
    Refusal(
        "heterogeneous_layers",
        "Model",
        "--heterogeneous-layers-config-path / --heterogeneous-layers-config-encoded-json",
        "{heterogeneous_layers_config_path} / {heterogeneous_layers_config_encoded_json}",
        lambda a, s: bool(a.heterogeneous_layers_config_path or a.heterogeneous_layers_config_encoded_json),
        "describes another model",
        "--num-layers and --moe-layer-freq",
        "--heterogeneous-layers-config-path layers.json",
    ),
    Refusal(
        "mtp_standalone",
        MTP,
        "--mtp-standalone",
        "",
        lambda a, s: a.mtp_standalone,
        "MTP shares embedding and head with the main model (R§2.2)",
        "--pipeline-model-parallel-layout to place the MTP layer",
        "--mtp-standalone",
    ),
    Refusal(
        "upcycling",
        "Model",
        "--moe-use-upcycling",
        "",
        lambda a, s: a.moe_use_upcycling,
        "a dense checkpoint has no multi-latent attention or groups to start from",
        "random initial weights, or a converted DeepSeek-V3 checkpoint",
        "--moe-use-upcycling",
    ),
)
