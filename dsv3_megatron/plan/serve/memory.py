"""What a GPU holds while it serves, and how many requests fit. Pure."""

from dsv3_megatron.plan.parameters import counts_of_sizes
from dsv3_megatron.plan.serve.job import BYTES, ServingJob

__all__ = ["longest_context", "max_batch", "memory_parts"]

_WIDE = 2.0  # bytes of embedding, head, router and norms, which stay in bf16


def _weights(job: ServingJob) -> dict[str, float]:
    """Bytes of the weights on a GPU, by part."""
    sizes, e = job.sizes, BYTES[job.weights]
    counts = counts_of_sizes(sizes, job.tp)
    mtp = sizes.mtp_num_layers if job.acceptance is not None else 0
    moe_layers = sizes.num_moe_layers + (mtp if sizes.num_moe_layers else 0)
    expert = 3 * sizes.hidden_size * sizes.moe_ffn_hidden_size
    whole_shared = 0 if job.deployment.shared_as_routed else sizes.moe_shared_expert_intermediate_size
    rows = 2 * sizes.padded_vocab_size * sizes.hidden_size / job.tp
    return {
        "attention": (sizes.num_layers + mtp) * counts.dense["attention"] * e,
        "dense MLPs": job.num_dense * 3 * sizes.hidden_size * sizes.ffn_hidden_size * e,
        "experts": moe_layers * job.slots_per_gpu * expert * e,
        "shared experts": moe_layers * 3 * sizes.hidden_size * whole_shared * e,
        "embedding, head, routers": rows * _WIDE
        + moe_layers * sizes.num_moe_experts * sizes.hidden_size * _WIDE,
    }


def _work(job: ServingJob, batch: float) -> float:
    """Bytes of activations: the largest layer's, some hidden states and what was sent to the experts of a GPU."""
    sizes = job.sizes
    tokens = batch * job.queries
    hidden = 6 * sizes.hidden_size + 3 * sizes.moe_ffn_hidden_size
    return tokens * (4 * sizes.hidden_size + job.topk * job.imbalance * hidden) * 2.0


def memory_parts(job: ServingJob) -> dict[str, float]:
    """Bytes of a GPU by part; a replica's requests are in the cache of each of its `tp` GPUs."""
    cache = job.batch * job.tp * job.context * job.cache_bytes_per_token
    return {
        **_weights(job),
        "cache": cache,
        "activations": _work(job, job.batch),
        "CUDA, messages": job.gpu.overhead,
    }


def max_batch(job: ServingJob) -> float:
    """Requests per GPU with which its memory is full; below 0 where the weights alone do not fit."""
    return _free(job) / (job.tp * job.context * job.cache_bytes_per_token + _work(job, 1.0))


def longest_context(job: ServingJob) -> float:
    """Tokens of one request that the cache of a replica holds; each of its GPUs has them all."""
    return _free(job) / job.cache_bytes_per_token


def _free(job: ServingJob) -> float:
    """Bytes that cache and activations have."""
    return job.gpu.memory - job.gpu.overhead - sum(_weights(job).values())
