"""Experts that move between ranks."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.dispatch import two_hop, uneven_nodes
from dsv3_megatron.arguments.refusals.table import Refusal, has_cuda_graphs
from dsv3_megatron.dispatch.arguments import TWO_HOP

FEATURE = "Expert placement"
ARGUMENT = "--expert-placement"
ON = f"{ARGUMENT} balanced --expert-placement-interval 10 --expert-model-parallel-size 4"


def _on(a: Namespace) -> bool:
    return a.expert_placement == "balanced"


ROWS = (
    Refusal(
        "placement_alone",
        FEATURE,
        ARGUMENT,
        "balanced",
        lambda a, s: _on(a) and a.expert_model_parallel_size == 1,
        "with --expert-model-parallel-size 1 all experts are on every rank",
        "--expert-model-parallel-size 2 or more, or leave it out",
        f"{ARGUMENT} balanced --expert-placement-interval 10",
    ),
    Refusal(
        "placement_interval",
        FEATURE,
        "--expert-placement-interval",
        "{expert_placement_interval}",
        lambda a, s: _on(a) and (a.expert_placement_interval or 0) < 1,
        "experts are placed by the load of so many steps",
        "1 or more, for instance 100",
        f"{ARGUMENT} balanced --expert-model-parallel-size 4",
    ),
    Refusal(
        "placement_interval_alone",
        FEATURE,
        "--expert-placement-interval",
        "{expert_placement_interval}",
        lambda a, s: not _on(a) and a.expert_placement_interval is not None,
        f"{ARGUMENT} fixed leaves experts where they are",
        f"{ARGUMENT} balanced as well, or leave it out",
        "--expert-placement-interval 10",
    ),
    Refusal(
        "placement_nodes",
        FEATURE,
        "--moe-node-size",
        "{moe_node_size}",
        lambda a, s: _on(a) and not two_hop(a) and uneven_nodes(a, s),
        "expert groups stay on their nodes, so the ranks that share a layer's experts must fill nodes, or part of one",
        "a number of ranks that divides them, or a multiple (default: {ranks_per_node}, torchrun's local ranks)",
        f"{ON} --moe-node-size 3",
    ),
    Refusal(
        "node_size_alone",
        FEATURE,
        "--moe-node-size",
        "{moe_node_size}",
        lambda a, s: a.moe_node_size is not None and not _on(a) and not two_hop(a),
        "only --moe-token-dispatcher-type two_hop and --expert-placement balanced ask where a node ends",
        "one of these as well, or leave it out",
        "--moe-node-size 4",
    ),
    Refusal(
        "placement_flex",
        FEATURE,
        "--moe-token-dispatcher-type",
        "{moe_token_dispatcher_type}",
        lambda a, s: _on(a) and a.moe_token_dispatcher_type == "flex",
        "DeepEP adds up a token's experts in the order of their ranks: the losses would change when experts move",
        "two_hop or alltoall",
        f"{ON} --moe-token-dispatcher-type flex",
    ),
    Refusal(
        "placement_allgather",
        FEATURE,
        "--moe-token-dispatcher-type",
        "{moe_token_dispatcher_type}",
        lambda a, s: _on(a) and a.moe_token_dispatcher_type not in ("alltoall", TWO_HOP, "flex"),
        "gathers all tokens for the experts of each rank as if all were at home",
        "two_hop or alltoall",
        f"{ON} --moe-token-dispatcher-type allgather",
    ),
    Refusal(
        "placement_cuda_graphs",
        FEATURE,
        ARGUMENT,
        "balanced",
        lambda a, s: _on(a) and has_cuda_graphs(a),
        "CUDA graphs (--cuda-graph-impl {cuda_graph_impl}) would keep the placement that they were captured with",
        "no CUDA graphs",
        f"{ON} --transformer-impl transformer_engine --cuda-graph-impl transformer_engine",
    ),
    Refusal(
        "placement_fp8_parameters",
        FEATURE,
        ARGUMENT,
        "balanced",
        lambda a, s: _on(a) and bool(a.fp8_param_gather),
        "with --fp8-param-gather weights exist in FP8 only, with scales that do not move with them",
        "bf16 weights",
        f"{ON} --fp8-param-gather",
    ),
    Refusal(
        "placement_scaled_moments",
        FEATURE,
        ARGUMENT,
        "balanced",
        lambda a, s: (
            _on(a) and not {a.exp_avg_dtype, a.exp_avg_sq_dtype, a.main_params_dtype} <= {"fp32", "bf16"}
        ),
        "FP8 and fp16 moments or masters have scales, kept in the optimizer, that do not move with them",
        "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --main-params-dtype fp32",
        f"{ON} --bf16 --use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype fp8",
    ),
    Refusal(
        "placement_optimizer_offload",
        FEATURE,
        "--optimizer-cpu-offload",
        "",
        lambda a, s: _on(a) and a.optimizer_cpu_offload,
        f"{ARGUMENT} balanced moves masters and moments between GPUs, not between their copies in CPU memory",
        "--use-distributed-optimizer alone",
        f"{ON} --optimizer-cpu-offload --transformer-impl transformer_engine",
    ),
)
