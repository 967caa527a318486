"""Activations of Transformer Engine's fused modules on a GPU: what is planned for, not measured here.

Formats as in report §3.3.3 with FP8: inputs of linear layers in E4M3, that of the linear layer after attention in
E5M6 (12 bits), SwiGLU's inputs in E4M3 with its output recomputed; else all in the compute dtype. Tensor parallelism
means sequence parallelism: what is not split by heads or width is split by sequence. Fused attention keeps queries,
keys, values, the output and one fp32 number per query and head, but no probabilities.
"""

from collections.abc import Iterator

from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.kept import Block, Kept

FP32 = 4
SCALES = 1 + 4 / 128  # bytes of an E4M3 element with its share of a tile's scale
E5M6 = 1.5 + 4 / 128


def blocks(job: Job, stage: Stage) -> list[Block]:
    """See `activations.blocks`."""
    row = []
    for _ in range(stage.dense):
        row += [_attention(job), _dense_mlp(job)]
    for _ in range(stage.moe):
        row += [_attention(job), _moe(job)]
    for _ in range(stage.mtp):
        row += [_mtp_input(job), _attention(job), _moe(job)]
    if stage.head:
        row.append(_head(job, 1 + stage.mtp))
    if (
        "full" in job.recompute
    ):  # of a layer only its input is kept; one layer's own is there while it runs backward
        row = [_only_input(job, block) for block in row]
    return row


def _only_input(job: Job, block: Block) -> Block:
    if any(tensor.part in ("head", "mtp") for tensor in block.kept):
        return block
    size = (
        job.precision.compute * job.sizes.hidden_size * job.tokens / job.layout.tp / 2
    )  # two blocks per layer
    kept = (Kept("layer", "input", size),)
    return Block(kept, block.deferred, block.forward + block.size, block.backward + 2 * block.size)


def _block(job: Job, kept: Iterator[tuple[str, str, float]], *others: float) -> Block:
    tensors = tuple(Kept(part, name, size * job.tokens) for part, name, size in kept if size)
    return Block(tensors, *(size * job.tokens for size in others))


def _linear_input(job: Job) -> float:
    """Bytes per element of a linear layer's input as it is cached."""
    return SCALES if job.precision.fp8 else job.precision.compute


def _attention(job: Job) -> Block:
    s, e, tp, again = job.sizes, job.precision.compute, job.layout.tp, job.recompute
    h, heads, v = s.hidden_size, s.num_attention_heads / tp, s.v_head_dim
    qk, q_rank, kv_rank = s.qk_head_dim + s.qk_pos_emb_head_dim, s.q_lora_rank or 0, s.kv_lora_rank
    cached = _linear_input(job)
    up_again = "mla_up_proj" in again

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "residual", e * h / tp
        yield "attention", "input of the down projections", 0 if "layernorm" in again else cached * h / tp
        yield "attention", "latents and rope part", e * (q_rank + kv_rank + s.qk_pos_emb_head_dim) / tp
        yield "attention", "inputs of the up projections", 0 if up_again else cached * (q_rank + kv_rank)
        if "core_attn" not in again:
            yield "attention", "queries, keys, values", 0 if up_again else e * heads * (2 * qk + v)
            yield "attention", "row sums of the softmax", FP32 * heads
        # Attention's own backward needs its output, which is also the next linear layer's input (R§3.3.3).
        yield "attention", "output", (E5M6 if job.precision.fp8 else e) * heads * v

    inputs = h / tp + q_rank + kv_rank + heads * v
    outputs = (q_rank + kv_rank + s.qk_pos_emb_head_dim) / tp + heads * (qk + s.qk_head_dim + v) + h / tp
    workspace = e * heads * (2 * qk + 2 * v)
    return _block(job, kept(), cached * inputs + cached * outputs, workspace, 2 * workspace)


def _swiglu(job: Job, width: float) -> float:
    """Both halves, and the product unless it is computed again."""
    again = "moe_act" in job.recompute
    return _linear_input(job) * (2 * width + (0 if again else width))


def _dense_mlp(job: Job) -> Block:
    s, e, tp = job.sizes, job.precision.compute, job.layout.tp
    cached, width = _linear_input(job), s.ffn_hidden_size / tp
    again = "mlp" in job.recompute

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "residual", e * s.hidden_size / tp
        yield (
            "dense_mlp",
            "input",
            0 if again or "layernorm" in job.recompute else cached * s.hidden_size / tp,
        )
        yield "dense_mlp", "SwiGLU", 0 if again else _swiglu(job, width)

    workspace = e * (4 * width + 2 * s.hidden_size)
    return _block(job, kept(), cached * (2 * s.hidden_size + 3 * width), workspace, 1.5 * workspace)


def _moe(job: Job) -> Block:
    s, e, tp = job.sizes, job.precision.compute, job.layout.tp
    h, cached, shared = s.hidden_size, _linear_input(job), s.moe_shared_expert_intermediate_size / tp
    routed = job.routed_tokens / job.tokens
    shared_again = "shared_experts" in job.recompute
    all_again = "moe" in job.recompute

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "residual", e * h / tp
        yield "norm", "input of router and experts", 0 if "layernorm" in job.recompute else e * h / tp
        if all_again:
            return
        yield "router", "scores, map, indices", (2 * FP32 + 1) * s.num_moe_experts / tp
        yield "routed_experts", "dispatched inputs", cached * h * routed
        yield "routed_experts", "SwiGLU", _swiglu(job, s.moe_ffn_hidden_size) * routed
        yield "shared_experts", "SwiGLU", 0 if shared_again else _swiglu(job, shared)

    deferred = cached * ((2 * h + 3 * s.moe_ffn_hidden_size) * routed + 2 * h + 3 * shared)
    workspace = e * (2 * h + 3 * s.moe_ffn_hidden_size) * routed
    return _block(job, kept(), deferred, workspace, 1.2 * workspace)


def _mtp_input(job: Job) -> Block:
    e, h, tp = job.precision.compute, job.sizes.hidden_size, job.layout.tp

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "mtp", "embedding, hidden states, joined input", (2 * e * h + 2 * _linear_input(job) * h) / tp

    return _block(job, kept(), _linear_input(job) * 3 * h)


def _head(job: Job, num_heads: int) -> Block:
    """The head's input and its softmax, in the compute dtype (fused cross-entropy) with an fp32 copy at work."""
    e, vocab, h, tp = job.precision.compute, job.sizes.padded_vocab_size, job.sizes.hidden_size, job.layout.tp

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "head", "input", e * h * num_heads / tp
        yield "head", "softmax", e * vocab / tp * num_heads

    return _block(job, kept(), 0, FP32 * vocab / tp, FP32 * vocab / tp)
