"""Memory that is no tensor of the model: the dispatcher's buffers, the pool of CUDA graphs, the rest of the overhead.

None of it was ever compared with a measured peak: published ones are of all-to-all, without graphs.
"""

from collections.abc import Sequence

from dsv3_megatron.plan.activations import blocks
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.token_exchange import nvlink_domain

GIB = 2**30
# What NCCL keeps for the experts' communicator: stated, a part of the 5 GiB of the hardware table for everything that
# is no tensor. DeepEP's buffers are as large.
NCCL = 0.6 * GIB
# DeepEP's own configurations, tokens that wait in a channel: over NVLink, over InfiniBand (deep_ep/buffer.py).
_NVLINK_TOKENS, _IB_TOKENS = 288, 128
# Beside a token's row: places for 128 experts' indices (int64) and weights (fp32), and for 128 scales (fp32).
_META = 128 * (8 + 4 + 4)
_NARROW = 8
# Blocks of a stage, and the part of `job.Software.graphs` that holds them.
_PART_OF = {"attention": "attn", "dense_mlp": "mlp", "routed_experts": "moe"}


def outside(job: Job, gpu: Gpu, stages: Sequence[Stage]) -> dict[str, float]:
    """Bytes of a rank with these stages, by the names of the memory table's columns."""
    return {
        "dispatch buffers": dispatch_buffers(job, gpu),
        "CUDA graphs": graph_pool(job, stages),
        "overhead": gpu.overhead - (NCCL if job.layout.expert_ranks > 1 else 0),
    }


def dispatch_buffers(job: Job, gpu: Gpu) -> float:
    """What the dispatcher keeps for itself, in bytes of a rank.

    DeepEP (`csrc/config.hpp`): a ring of rows for each channel, two SMs each, and peer. HybridEP
    (`csrc/hybrid_ep`): room for all tokens of the group in BF16, with a weight for each expert of the domain; what
    arrives and what is sent back share it.
    """
    layout, ranks = job.layout, job.layout.expert_ranks
    if ranks == 1:
        return 0
    if job.dispatcher != "flex":
        return NCCL
    row = 2 * job.sizes.hidden_size
    domain = min(ranks, nvlink_domain(job, gpu))
    if job.flex_backend == "hybridep":
        tokens = job.tokens / layout.tp * ranks
        experts_there = job.sizes.num_moe_experts * min(1.0, domain / ranks)
        return tokens * (row + 4 * experts_there)
    channels = (job.communication_sms or gpu.achieved.communication_sms) / 2
    near = min(domain, _NARROW)
    size = channels * near * _NVLINK_TOKENS * (row + _META)
    if ranks > near:
        size += channels * (ranks / near) * _IB_TOKENS * 2 * (row + _META)
    return size


def graph_pool(job: Job, stages: Sequence[Stage]) -> float:
    """What the graphs of a rank take beside the tensors that are counted anyway.

    They share one pool, apart from the allocator's, so that the largest workspace of what is captured is there twice;
    and each captured layer has a place for its input, its output and the gradient, which do not move (Megatron's
    guide, §2.3). The graphs' own structure is negligible there. A graph of the whole iteration has all in one pool.
    """
    graphs = job.software.graphs
    if not graphs or job.whole_iteration_graph:
        return 0
    workspace = max(
        (
            max(block.forward, block.backward)
            for stage in set(stages)
            for block in blocks(job, stage)
            if any(_PART_OF.get(tensor.part) in graphs for tensor in block.kept)
        ),
        default=0.0,
    )
    places = 3 * job.precision.compute * job.tokens / job.layout.tp * job.sizes.hidden_size
    return workspace + places * sum(stage.num_layers for stage in stages)
