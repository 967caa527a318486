"""Activations of the reference backend: plain PyTorch modules and autograd, as they run on CPU.

Every entry was found by listing the live tensors of real runs; `tests/plan/test_memory.py` compares the sums. In
the formulas `e` is the bytes per element of the compute dtype, sizes are per token unless they say otherwise.
Tensor parallelism is not modelled.
"""

import math
from collections.abc import Iterator

from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.kept import Block, Kept

FP32, INT64 = 4, 8
E5M6 = 1.5  # bytes, packed
TILE = 128  # elements with one fp32 scale in FP8 (report §3.3.2)


def blocks(job: Job, stage: Stage) -> list[Block]:
    """See `activations.blocks`."""
    row = [] if stage.embedding else [_input(job)]
    for _ in range(stage.dense):
        row += [_attention(job), _dense_mlp(job)]
    for _ in range(stage.moe):
        row += [_attention(job), _moe(job)]
    if stage.head:
        row.append(_final_norm(job))
    for _ in range(stage.mtp):
        row += [_mtp_input(job), _attention(job), _moe(job), _mtp_norm(job)]
    if stage.head:
        row.append(_head(job, 1 + job.sizes.mtp_num_layers))
    return row


def _block(job: Job, kept: Iterator[tuple[str, str, float]], *others: float) -> Block:
    """From bytes per token to bytes per microbatch."""
    tensors = tuple(Kept(part, name, size * job.tokens) for part, name, size in kept if size)
    return Block(tensors, *(size * job.tokens for size in others))


def _norm(job: Job, width: int, recomputed: bool = False, output: bool | None = None) -> float:
    """A norm and its input: fp32 input and normalised values, 1/rms, and the output in the compute dtype.

    In fp32 the input is the residual stream or latent itself. Of a recomputed norm only the input is kept. FP8 layers
    keep the output in E4M3 of their own; it is there besides only where something else needs it (`output`).
    """
    e = job.precision.compute
    if recomputed:
        return e * width
    with_output = not job.precision.fp8 if output is None else output
    return FP32 * (2 * width + 1) + (e * width if with_output else 0)


def _tiles(width: float, bytes_per_element: float = 1.0) -> float:
    """Quantised values and their scales, one per 128 columns."""
    return bytes_per_element * width + FP32 * math.ceil(width / TILE)


def _cached(job: Job, width: int) -> float:
    """What an FP8 linear layer keeps of its input; 0 in other precisions, where the input itself is listed."""
    return _tiles(width) if job.precision.fp8 else 0


def _deferred(job: Job, elements: float, rows: float) -> float:
    """Inputs and output gradients that wait, of layers with so many columns in all, `rows` of them each.

    In FP8 they wait as operands of the weight gradient: transposed, a scale for 128 rows.
    """
    if not job.precision.fp8:
        return job.precision.compute * elements
    return elements * (1 + FP32 * math.ceil(rows / TILE) / rows)


def _recomputes(job: Job, module: str) -> bool:
    return module in job.recompute


def _input(job: Job) -> Block:
    """The activation from the previous stage; the first norm keeps it too, unless it makes an fp32 copy."""
    own = job.precision.compute != FP32 and not _recomputes(job, "layernorm")
    size = job.precision.compute * job.sizes.hidden_size if own else 0
    return _block(job, iter([("input", "activation from the previous stage", size)]))


def _attention(job: Job) -> Block:
    s, e = job.sizes, job.precision.compute
    h, heads, qk, v = (
        s.hidden_size,
        s.num_attention_heads,
        s.qk_head_dim + s.qk_pos_emb_head_dim,
        s.v_head_dim,
    )
    q_rank, kv_rank, rope = s.q_lora_rank or 0, s.kv_lora_rank, s.qk_pos_emb_head_dim
    up_again = _recomputes(job, "mla_up_proj")
    probabilities = FP32 * heads * s.seq_length  # PyTorch's plain attention computes in fp32
    tables = rope * (FP32 + (0 if up_again else 4 * e)) / job.micro_batch_size  # [sequence, rope part]

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "input norm", _norm(job, h, _recomputes(job, "layernorm"))
        yield "attention", "query latent and its norm", _norm(job, q_rank, output=latents) if q_rank else 0
        yield "attention", "key-value latent and its norm", _norm(job, kv_rank, output=latents)
        yield "attention", "E4M3 inputs of the down projections", 2 * _cached(job, h)
        if not up_again:
            yield (
                "attention",
                "E4M3 inputs of the up projections",
                _cached(job, q_rank) + _cached(job, kv_rank),
            )
        if e == FP32:
            yield "attention", "rope part of the key", e * rope
        elif up_again:
            yield "attention", "key-value latent before its norm", e * (kv_rank + rope)
        yield "attention", "rope tables", tables
        yield "attention", "scaled queries and keys", FP32 * 2 * heads * qk
        yield "attention", "probabilities", probabilities
        yield "attention", "values", FP32 * heads * v if not (up_again and e == FP32) else 0
        yield "attention", "output", _tiles(heads * v, E5M6) if job.precision.fp8 else e * heads * v

    latents = up_again or not job.precision.fp8  # recompute starts from them
    linear = (h + q_rank + kv_rank + rope) + (q_rank + heads * qk) + (kv_rank + heads * (s.qk_head_dim + v))
    linear += heads * v + h
    up = e * heads * (qk + s.qk_head_dim + v)
    forward = probabilities + 2 * e * heads * qk + up
    backward = 2 * probabilities + e * heads * (qk + v) + 2 * e * h
    if up_again:
        backward += up + e * heads * v
    if _recomputes(job, "layernorm"):
        backward += (FP32 + e) * h
    deferred = _deferred(job, linear, job.tokens)
    if up_again and not job.precision.fp8:
        deferred += e * (q_rank + kv_rank)  # the latents of the first forward beside those of the second
    return _block(job, kept(), deferred, forward, backward)


def _dense_mlp(job: Job) -> Block:
    s, e = job.sizes, job.precision.compute
    h, width, again = s.hidden_size, s.ffn_hidden_size, _recomputes(job, "layernorm")

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "norm before the MLP", _norm(job, h, again)
        if job.precision.fp8:
            yield "dense_mlp", "E4M3 inputs of the MLP and of its SwiGLU", _tiles(h) + _tiles(2 * width)
        else:
            yield "dense_mlp", "SwiGLU: halves, factors, output", e * 5 * width

    backward = e * (width + 2 * h) + ((FP32 + e) * h if again else 0)
    if job.precision.fp8:
        backward += FP32 * 6 * width  # SwiGLU's derivative is in fp32
    return _block(job, kept(), _deferred(job, 2 * h + 3 * width, job.tokens), e * 2 * h, backward)


def _moe(job: Job) -> Block:
    s, e = job.sizes, job.precision.compute
    h, experts, topk = s.hidden_size, s.num_moe_experts, s.moe_router_topk
    width, shared = job.expert_width, s.moe_shared_expert_intermediate_size
    routed = job.routed_tokens / job.tokens  # copies per token
    again = _recomputes(job, "layernorm")

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "norm before the MLP", _norm(job, h, again, output=True)
        yield "router", "scores, probabilities, map", (2 * FP32 + 1) * experts
        yield "router", "chosen scores and their sums", FP32 * (topk + 1 + job.balance_loss)
        yield "router", "sorted indices", INT64 * (2 * experts + topk)
        if job.precision.fp8:
            yield "routed_experts", "E4M3 inputs, probabilities", (_tiles(h) + FP32) * routed
            yield "routed_experts", "E4M3 inputs of SwiGLU", _tiles(2 * width) * routed
            yield "shared_experts", "E4M3 inputs of the MLP and of its SwiGLU", _tiles(h) + _tiles(2 * shared)
        else:
            yield "routed_experts", "inputs and probabilities", (e * h + FP32) * routed
            yield "routed_experts", "SwiGLU: halves, factors, output, weighted", e * 6 * width * routed
            yield "shared_experts", "SwiGLU: halves, factors, output", e * 5 * shared

    rows = job.routed_tokens * job.layout.ep / experts  # of one expert
    deferred = _deferred(job, 2 * h + 3 * shared, job.tokens)
    deferred += _deferred(job, 2 * h + 3 * width, rows) * routed
    forward = e * (3 * h * routed + h)  # permuted tokens, the experts' outputs apart and together
    backward = e * (2 * h * routed + h) + ((FP32 + e) * h if again else 0)
    return _block(job, kept(), deferred, forward, backward)


def _final_norm(job: Job) -> Block:
    return _block(job, iter([("head", "final norm", _norm(job, job.sizes.hidden_size))]))


def _mtp_input(job: Job) -> Block:
    """Both norms and the projection in front of an MTP layer; the norms' outputs are kept joined."""
    h, e = job.sizes.hidden_size, job.precision.compute
    normed = FP32 * (h + 1)
    copy = 0 if e == FP32 else FP32 * h  # of the main model's hidden states

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "mtp", "embedding and its norm", normed + FP32 * h
        yield "mtp", "norm of the hidden states", normed + copy
        yield "mtp", "joined input of the projection", _cached(job, 2 * h) or e * 2 * h

    deferred = _deferred(job, 3 * h, job.tokens)
    if _recomputes(job, "layernorm") and not job.precision.fp8:
        deferred += e * 2 * h
    return _block(job, kept(), deferred)


def _mtp_norm(job: Job) -> Block:
    h, e = job.sizes.hidden_size, job.precision.compute

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "mtp", "final norm", FP32 * (2 * h + 1)
        yield "mtp", "hidden states of both heads, joined", e * 2 * h

    return _block(job, kept())


def _head(job: Job, num_heads: int) -> Block:
    """Cross-entropy keeps the softmax in fp32; the head's weight gradient is never put off."""
    vocab, h, e = job.sizes.padded_vocab_size, job.sizes.hidden_size, job.precision.compute
    logits = e * vocab if e != FP32 else 0
    kept = iter([("head", "softmax", FP32 * vocab * num_heads)])
    return _block(job, kept, 0, logits, logits + e * h)
