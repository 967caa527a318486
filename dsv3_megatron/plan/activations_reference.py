"""Activations of the reference backend: plain PyTorch modules and autograd, as they run on CPU.

Every entry was found by listing the live tensors of real runs; `tests/plan/test_memory.py` compares the sums. In
the formulas `e` is the bytes per element of the compute dtype, sizes are per token unless they say otherwise.
Tensor parallelism is not modelled.
"""

from collections.abc import Iterator

from dsv3_megatron.plan.activations import Block, Kept
from dsv3_megatron.plan.job import Job, Stage

FP32, INT64 = 4, 8


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
        row.append(_head(job, 1 + stage.mtp))
    return row


def _block(job: Job, kept: Iterator[tuple[str, str, float]], *others: float) -> Block:
    """From bytes per token to bytes per microbatch."""
    tensors = tuple(Kept(part, name, size * job.tokens) for part, name, size in kept if size)
    return Block(tensors, *(size * job.tokens for size in others))


def _norm(job: Job, width: int, recomputed: bool = False) -> float:
    """A norm and its input: fp32 input and normalised values, 1/rms, and the output in the compute dtype.

    In fp32 the input is the residual stream or latent itself. Of a recomputed norm only the input is kept.
    """
    e = job.precision.compute
    return e * width if recomputed else FP32 * (2 * width + 1) + e * width


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
        yield "attention", "query latent and its norm", _norm(job, q_rank) if q_rank else 0
        yield "attention", "key-value latent and its norm", _norm(job, kv_rank)
        if e == FP32:
            yield "attention", "rope part of the key", e * rope
        elif up_again:
            yield "attention", "key-value latent before its norm", e * (kv_rank + rope)
        yield "attention", "rope tables", tables
        yield "attention", "scaled queries and keys", FP32 * 2 * heads * qk
        yield "attention", "probabilities", probabilities
        yield "attention", "values", FP32 * heads * v if not (up_again and e == FP32) else 0
        yield "attention", "output", e * heads * v

    linear = (h + q_rank + kv_rank + rope) + (q_rank + heads * qk) + (kv_rank + heads * (s.qk_head_dim + v))
    linear += heads * v + h
    up = e * heads * (qk + s.qk_head_dim + v)
    forward = probabilities + 2 * e * heads * qk + up
    backward = 2 * probabilities + e * heads * (qk + v) + 2 * e * h
    if up_again:
        backward += up + e * heads * v
    if _recomputes(job, "layernorm"):
        backward += (FP32 + e) * h
    return _block(job, kept(), e * linear, forward, backward)


def _dense_mlp(job: Job) -> Block:
    s, e = job.sizes, job.precision.compute
    h, width, again = s.hidden_size, s.ffn_hidden_size, _recomputes(job, "layernorm")

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "norm before the MLP", _norm(job, h, again)
        yield "dense_mlp", "SwiGLU: halves, factors, output", e * 5 * width

    backward = e * (width + 2 * h) + ((FP32 + e) * h if again else 0)
    return _block(job, kept(), e * (2 * h + 3 * width), e * 2 * h, backward)


def _moe(job: Job) -> Block:
    s, e = job.sizes, job.precision.compute
    h, experts, topk = s.hidden_size, s.num_moe_experts, s.moe_router_topk
    width, shared = s.moe_ffn_hidden_size, s.moe_shared_expert_intermediate_size
    routed = job.routed_tokens / job.tokens  # copies per token
    again = _recomputes(job, "layernorm")

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "norm before the MLP", _norm(job, h, again)
        yield "router", "scores, probabilities, map", (2 * FP32 + 1) * experts
        yield "router", "chosen scores and their sums", FP32 * (topk + 1 + job.balance_loss)
        yield "router", "sorted indices", INT64 * (2 * experts + topk)
        yield "routed_experts", "inputs and probabilities", (e * h + FP32) * routed
        yield "routed_experts", "SwiGLU: halves, factors, output, weighted", e * 6 * width * routed
        yield "shared_experts", "SwiGLU: halves, factors, output", e * 5 * shared

    deferred = e * ((2 * h + 3 * shared) + (2 * h + 3 * width) * routed)
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
        yield "mtp", "joined input of the projection", e * 2 * h

    return _block(job, kept(), e * 3 * h)


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
