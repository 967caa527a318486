"""Seconds of a forward pass, layer by layer. Pure.

A product takes as long as its multiplications or the reading of its weights, whichever is longer; attention in decoding
as long as its multiplications or the reading of the cache. What kernels reach of the peaks is the training planner's
table (`plan.hardware`), fitted on training: nothing was fitted here.

Messages. Prefilling: a token crosses InfiniBand once per node (at most `GROUPS` nodes) and is passed on over NVLink.
Decoding: to each expert by itself, over InfiniBand where that is on another node (report §3.4.2). There e4m3 with a
scale per 128, back bf16.
"""

from dataclasses import dataclass, replace

from dsv3_megatron.plan.serve.job import BYTES, ServingJob

__all__ = ["LOW_LATENCY_IB", "LayerTime", "StepTime", "step_time"]

GROUPS = 4  # nodes that a token goes to at most (report §2.1.2)
# Share of InfiniBand that DeepEP's kernels of decoding reach with 128 tokens at EP128 (its README: 39 of 50 GB/s).
LOW_LATENCY_IB = 0.78
LAUNCH = 10e-6  # seconds between the parts of a layer that a CUDA graph does not hide; an assumption


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer, one microbatch: attention's products, its core, experts or MLP, messages there and back."""

    attention: float
    core: float
    mlp: float
    dispatch: float
    combine: float

    @property
    def compute(self) -> float:
        return self.attention + self.core + self.mlp

    @property
    def messages(self) -> float:
        return self.dispatch + self.combine


@dataclass(frozen=True)
class StepTime:
    """Seconds of a forward pass.

    Attributes:
        dense, moe: of a layer of each kind, of a microbatch.
        head: embedding and output.
        total: of the pass, all microbatches of all layers.
        bound: what the MoE layers mostly wait for.
    """

    dense: LayerTime
    moe: LayerTime
    head: float
    total: float
    bound: str


def step_time(job: ServingJob) -> StepTime:
    """Of one pass over the job's batch."""
    halves = job.deployment.microbatches
    part = replace(job, batch=job.batch / halves)
    dense, moe = _layer(part, moe=False), _layer(part, moe=True)
    sizes = job.sizes
    mtp = sizes.mtp_num_layers if job.acceptance is not None else 0
    num_moe = sizes.num_moe_layers + (mtp if sizes.num_moe_layers else 0)
    if halves == 1:
        of_moe = moe.compute + moe.messages + 4 * LAUNCH
    else:  # one half's messages beside the other's products
        of_moe = halves * (max(moe.compute, moe.messages) + 4 * LAUNCH)
    of_dense = halves * (dense.compute + 2 * LAUNCH)
    head = _head(job)
    total = num_moe * of_moe + (job.num_dense + (mtp if not sizes.num_moe_layers else 0)) * of_dense + head
    parts = {
        "messages": moe.messages,
        "attention's cache": moe.core,
        "attention's products": moe.attention,
        "experts": moe.mlp,
    }
    return StepTime(dense, moe, head, total, max(parts, key=parts.__getitem__))


def _layer(job: ServingJob, moe: bool) -> LayerTime:
    sizes = job.sizes
    heads = sizes.num_attention_heads
    tokens = job.tokens * job.tp  # of the replica, which its ranks share by heads
    q_rows = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
    down = sizes.hidden_size * ((sizes.q_lora_rank or 0) + sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim)
    query = (sizes.q_lora_rank or sizes.hidden_size) * q_rows
    up = sizes.kv_lora_rank * heads * (sizes.qk_head_dim + sizes.v_head_dim)
    out = heads * sizes.v_head_dim * sizes.hidden_size
    # Down projections: each rank its own tokens, whole weights.
    attention = _product(job, down, job.tokens) + _product(job, (query + up + out) / job.tp, tokens)
    attention += _within_replica(job)
    if not moe:
        mlp = _product(job, 3 * sizes.hidden_size * sizes.ffn_hidden_size, job.tokens)
        return LayerTime(attention, _core(job), mlp, 0.0, 0.0)
    expert = 3 * sizes.hidden_size * sizes.moe_ffn_hidden_size
    arriving = job.tokens * job.topk * job.imbalance
    # Experts without tokens are not read.
    busy = min(job.slots_per_gpu, arriving)
    mlp = max(_product(job, expert, arriving), _read(job, busy * expert))
    if not job.deployment.shared_as_routed:
        mlp += _product(job, 3 * sizes.hidden_size * sizes.moe_shared_expert_intermediate_size, job.tokens)
    there = sizes.hidden_size * (1 + 4 / 128)
    back = sizes.hidden_size * 2.0
    return LayerTime(attention, _core(job), mlp, _message(job, there), _message(job, back))


def _product(job: ServingJob, weights: float, tokens: float) -> float:
    gpu = job.gpu
    if job.weights == "fp8":
        speed = gpu.fp8 * gpu.achieved.fp8_gemm
    else:
        speed = gpu.bf16 * gpu.achieved.bf16_gemm
    return max(2 * weights * tokens / speed, _read(job, weights))


def _read(job: ServingJob, weights: float) -> float:
    return weights * BYTES[job.weights] / (job.gpu.hbm * job.gpu.achieved.hbm)


def _core(job: ServingJob) -> float:
    """Attention proper of a replica's requests on one of its GPUs, which has 1/tp of the heads and the whole cache."""
    sizes, gpu = job.sizes, job.gpu
    requests, heads = job.batch * job.tp, sizes.num_attention_heads / job.tp
    latent = sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
    if job.phase == "prefill" and not job.absorbed_prefill:
        per_pair = sizes.qk_head_dim + sizes.qk_pos_emb_head_dim + sizes.v_head_dim
    else:
        per_pair = latent + sizes.kv_lora_rank
    if job.phase == "prefill":
        keys = job.context * (1 + job.cached) / 2  # causal: half of the new ones, all of the found ones
    else:
        keys = float(job.context)
    flops = 2 * requests * job.queries * keys * per_pair * heads
    read = requests * job.context * latent * BYTES[job.cache]
    return max(flops / (gpu.bf16 * gpu.achieved.attention_forward), read / (gpu.hbm * gpu.achieved.hbm))


def _within_replica(job: ServingJob) -> float:
    """Sequence parallelism: queries and latents are gathered, outputs reduced and scattered, over NVLink."""
    if job.tp == 1:
        return 0.0
    sizes = job.sizes
    gathered = (sizes.q_lora_rank or sizes.hidden_size) + sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
    numbers = job.tokens * (job.tp - 1) * (gathered + sizes.hidden_size)
    return numbers * 2.0 / (job.gpu.nvlink * job.gpu.achieved.nvlink)


def _message(job: ServingJob, per_token: float) -> float:
    """Seconds of one direction of the all-to-all; bytes of one copy of a token."""
    gpu = job.gpu
    nodes = max(1, job.num_gpus // gpu.node)
    if job.num_gpus == 1:
        return 0.0
    nvlink = gpu.nvlink * gpu.achieved.nvlink
    elsewhere = (nodes - 1) / nodes
    copies = job.topk * job.imbalance
    if job.phase == "prefill":
        over_ib = min(nodes, GROUPS) * elsewhere * job.imbalance
        return job.tokens * per_token * max(over_ib / (gpu.ib * gpu.achieved.ib), copies / nvlink)
    over_ib, inside = copies * elsewhere, copies * (1 - elsewhere)
    return job.tokens * per_token * max(over_ib / (gpu.ib * LOW_LATENCY_IB), inside / nvlink)


def _head(job: ServingJob) -> float:
    """The output head on the last token of each request (and, with drafts, on the draft's)."""
    sizes = job.sizes
    rows = job.batch * job.tp * (1 if job.phase == "prefill" else job.queries)
    times = 1 if job.acceptance is None else 2
    wide = replace(job, weights="bf16")
    return times * _product(wide, sizes.padded_vocab_size * sizes.hidden_size / job.tp, rows)
