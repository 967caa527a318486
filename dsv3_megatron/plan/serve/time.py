"""Seconds of a forward pass, layer by layer. Pure.

A product takes as long as its multiplications or the reading of its weights, whichever is longer; attention in decoding
as long as its multiplications or the reading of the cache; norms, rotation, SwiGLU and quantisation the bytes that they
read and write (as `plan.operators` counts them for training). What kernels reach of the peaks, the clocks that the
power limit leaves and the SMs that messages take are the training planner's table (`plan.hardware`), fitted on
training. Fitted on serving is one number, `GAP` of decoding.

Messages. Prefilling: a token crosses InfiniBand once per node (at most `GROUPS` nodes) and is passed on over NVLink.
Decoding: to each expert by itself, over InfiniBand where that is on another node (report §3.4.2). There e4m3 with a
scale per 128, back bf16. Beside another half's products, prefilling's kernels take SMs from these; decoding's take none
(DeepEP's README: its hook).
"""

from dataclasses import dataclass, replace

from dsv3_megatron.plan.serve.job import BYTES, ServingJob

__all__ = ["GAP", "LOW_LATENCY_IB", "LayerTime", "StepTime", "step_time"]

GROUPS = 4  # nodes that a token goes to at most (report §2.1.2)
# Share of InfiniBand that DeepEP's kernels of decoding reach with 128 tokens at EP128 (its README: 39 of 50 GB/s).
LOW_LATENCY_IB = 0.78
# Seconds of a MoE layer and half in which kernels start, fill the SMs and end; half of it in a dense layer. Decoding's
# is what DeepSeek's trace of decoding has beyond the rest (`published.py`): some 30 kernels of a few µs that wait for
# each other. Prefilling's is an assumption, too small to matter.
GAP = {"decode": 157e-6, "prefill": 40e-6}


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer, one microbatch: attention's products, its core, experts or MLP, messages there and back.

    `between`: of what is between the products, all bytes at HBM's rate.
    """

    attention: float
    core: float
    mlp: float
    dispatch: float
    combine: float
    between: float

    @property
    def compute(self) -> float:
        return self.attention + self.core + self.mlp + self.between

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
    sizes, gap = job.sizes, GAP[job.phase]
    mtp = sizes.mtp_num_layers if job.acceptance is not None else 0
    num_moe = sizes.num_moe_layers + (mtp if sizes.num_moe_layers else 0)
    if halves == 1:
        of_moe = moe.compute + moe.messages + gap
    else:  # one half's messages beside the other's products
        of_moe = halves * (_beside(job, moe.compute, moe.messages) + gap)
    of_dense = halves * (dense.compute + gap / 2)
    head = _head(job)
    total = num_moe * of_moe + (job.num_dense + (mtp if not sizes.num_moe_layers else 0)) * of_dense + head
    parts = {
        "messages": moe.messages,
        "attention's cache": moe.core,
        "attention's products": moe.attention,
        "experts": moe.mlp,
        "norms, rotation, SwiGLU": moe.between,
    }
    return StepTime(dense, moe, head, total, max(parts, key=parts.__getitem__))


def _beside(job: ServingJob, compute: float, messages: float) -> float:
    """Of a half whose products run beside the other's messages."""
    if job.phase == "decode":
        return max(compute, messages)
    sms, taken = job.gpu.sms, job.gpu.achieved.communication_sms
    slower = sms / (sms - taken)
    if compute * slower <= messages:
        return messages
    return compute + messages * (1 - 1 / slower)  # on all SMs again when the messages are through


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
        between = _between(job, job.tokens * _of_mlp(job, sizes.ffn_hidden_size))
        return LayerTime(attention, _core(job), mlp, 0.0, 0.0, between)
    expert = 3 * sizes.hidden_size * sizes.moe_ffn_hidden_size
    arriving = job.tokens * job.topk * job.imbalance
    # Experts without tokens are not read.
    busy = min(job.slots_per_gpu, arriving)
    mlp = max(_product(job, expert, arriving), _read(job, busy * expert))
    traffic = arriving * _of_mlp(job, sizes.moe_ffn_hidden_size)
    if not job.deployment.shared_as_routed:
        mlp += _product(job, 3 * sizes.hidden_size * sizes.moe_shared_expert_intermediate_size, job.tokens)
        traffic += job.tokens * _of_mlp(job, sizes.moe_shared_expert_intermediate_size)
    there = sizes.hidden_size * (1 + 4 / 128)
    back = sizes.hidden_size * 2.0
    messages = _message(job, there), _message(job, back)
    return LayerTime(attention, _core(job), mlp, *messages, _between(job, traffic))


def _of_mlp(job: ServingJob, width: float) -> float:
    """Bytes per token around an MLP's products: SwiGLU between them, quantisation before each."""
    stored = BYTES[job.weights]
    return width * (2 * 2 * 2 + stored) + job.sizes.hidden_size * (2 + 2 * stored)


def _between(job: ServingJob, mlp: float) -> float:
    """Seconds of what reads and writes memory between a layer's products, the bytes around its MLP given."""
    sizes = job.sizes
    heads, nope, rope = sizes.num_attention_heads, sizes.qk_head_dim, sizes.qk_pos_emb_head_dim
    rank, v = sizes.kv_lora_rank, sizes.v_head_dim
    ranks = (sizes.q_lora_rank or 0) + rank
    if job.phase == "prefill" and not job.absorbed_prefill:
        numbers = heads * (6 * (nope + rope) + 5 * (nope + v) / 2 + 3 * v)
    else:  # queries in and out of the latents' space, attention's result there, values quantised for the last product
        numbers = heads * (2 * (nope + rope) + 2 * (rank + rope) + 2 * rank + 3 * v)
    # A replica's ranks have their heads of all its tokens; norms and what stands beside them, each its own tokens.
    per_token = 2 * numbers + 2 * 6 * sizes.hidden_size + 8 * ranks
    return (job.tokens * per_token + mlp) / (job.gpu.hbm * job.gpu.achieved.hbm)


def _product(job: ServingJob, weights: float, tokens: float) -> float:
    gpu = job.gpu
    if job.weights == "fp8":
        speed = gpu.fp8 * gpu.achieved.fp8_gemm
    else:
        speed = gpu.bf16 * gpu.achieved.bf16_gemm
    return max(2 * weights * tokens / (speed * gpu.sustained), _read(job, weights))


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
    speed = gpu.bf16 * gpu.achieved.attention_forward * gpu.sustained
    return max(flops / speed, read / (gpu.hbm * gpu.achieved.hbm))


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
