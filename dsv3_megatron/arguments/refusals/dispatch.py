"""The two-hop dispatcher, and options that only it reads."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal, has_cuda_graphs
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.dispatch.arguments import TWO_HOP

FEATURE = "Dispatch in two hops"
ARGUMENT = "--moe-token-dispatcher-type"
ON = f"{ARGUMENT} {TWO_HOP} --expert-model-parallel-size 4"


def two_hop(a: Namespace) -> bool:
    return a.moe_token_dispatcher_type == TWO_HOP


def _expert_ranks(a: Namespace) -> int:
    """Ranks beside each other that share the experts of a layer."""
    return a.expert_model_parallel_size * (a.expert_tensor_parallel_size or a.tensor_model_parallel_size)


def _node_size(a: Namespace, s: Surroundings) -> int:
    return s.ranks_per_node if a.moe_node_size is None else a.moe_node_size


def uneven_nodes(a: Namespace, s: Surroundings) -> bool:
    """Whether expert-parallel groups do not lie on whole nodes, or part of one."""
    size, ranks = _node_size(a, s), _expert_ranks(a)
    if size < 1:
        return True
    expert_tp = ranks // a.expert_model_parallel_size
    return size % ranks != 0 if ranks <= size else ranks % size != 0 or size % expert_tp != 0


def tokens_of_a_rank(a: Namespace) -> int:
    """Tokens of a microbatch that a rank dispatches: tensor-parallel ranks share a sequence, if at all."""
    return a.micro_batch_size * a.seq_length // a.context_parallel_size


ROWS = (
    Refusal(
        "two_hop_alone",
        FEATURE,
        ARGUMENT,
        TWO_HOP,
        lambda a, s: two_hop(a) and a.expert_model_parallel_size == 1,
        "with --expert-model-parallel-size 1 there is nobody to dispatch to",
        "--expert-model-parallel-size 2 or more, or leave it out",
        f"{ARGUMENT} {TWO_HOP}",
    ),
    Refusal(
        "two_hop_nodes",
        FEATURE,
        "--moe-node-size",
        "{moe_node_size}",
        lambda a, s: two_hop(a) and uneven_nodes(a, s),
        "the ranks that share a layer's experts (expert × expert tensor parallel) must fill nodes, or part of one",
        "a number of ranks that divides them, or a multiple (default: {ranks_per_node}, torchrun's local ranks)",
        f"{ON} --moe-node-size 3",
    ),
    Refusal(
        "two_hop_chunks",
        FEATURE,
        "--moe-two-hop-chunks",
        "{moe_two_hop_chunks}",
        lambda a, s: two_hop(a) and a.moe_two_hop_chunks is not None and a.moe_two_hop_chunks < 1,
        "tokens go through the hops in so many pieces",
        "1 or more (the report's channels: 10)",
        f"{ON} --moe-two-hop-chunks 0",
    ),
    Refusal(
        "two_hop_more_chunks_than_tokens",
        FEATURE,
        "--moe-two-hop-chunks",
        "{moe_two_hop_chunks}",
        lambda a, s: two_hop(a) and (a.moe_two_hop_chunks or 0) > tokens_of_a_rank(a),
        "each piece of a microbatch holds a token at least, and takes an exchange of its own",
        "at most the tokens of a microbatch on a rank (the report's channels: 10)",
        f"{ON} --moe-two-hop-chunks 1000000",
    ),
    Refusal(
        "communication_sms",
        FEATURE,
        "--communication-sms",
        "{communication_sms}",
        lambda a, s: a.communication_sms is not None and a.communication_sms < 2,
        "either link needs one at least",
        "2 or more (the report's: 20)",
        f"{ON} --communication-sms 1",
    ),
    Refusal(
        "communication_sms_of_alltoall",
        FEATURE,
        "--communication-sms",
        "{communication_sms}",
        lambda a, s: a.communication_sms is not None and a.moe_token_dispatcher_type not in (TWO_HOP, "flex"),
        f"{ARGUMENT} {{moe_token_dispatcher_type}} runs on Megatron's groups, for which NCCL chooses",
        f"{ARGUMENT} {TWO_HOP} or flex, or leave it out",
        "--communication-sms 20",
    ),
    Refusal(
        "chunks_without_two_hop",
        FEATURE,
        "--moe-two-hop-chunks",
        "{moe_two_hop_chunks}",
        lambda a, s: not two_hop(a) and a.moe_two_hop_chunks is not None,
        f"{ARGUMENT} {{moe_token_dispatcher_type}} has no chunks",
        f"{ARGUMENT} {TWO_HOP} as well, or leave it out",
        "--moe-two-hop-chunks 4",
    ),
    Refusal(
        "two_hop_shared_expert_overlap",
        FEATURE,
        "--moe-shared-expert-overlap",
        "",
        lambda a, s: two_hop(a) and a.moe_shared_expert_overlap,
        f"runs the shared expert in pieces inside Megatron's dispatchers, not inside {TWO_HOP}",
        "--pipeline-schedule dualpipe, which overlaps the shared expert as well",
        f"{ON} --moe-shared-expert-overlap",
    ),
    Refusal(
        "two_hop_cuda_graphs",
        FEATURE,
        ARGUMENT,
        TWO_HOP,
        lambda a, s: two_hop(a) and has_cuda_graphs(a),
        "with CUDA graphs (--cuda-graph-impl {cuda_graph_impl}): the host reads how many tokens go where",
        "no CUDA graphs, or flex",
        f"{ON} --transformer-impl transformer_engine --cuda-graph-impl transformer_engine",
    ),
)
