"""Activations of Transformer Engine's modules on a GPU, as Megatron's and this project's code have them save.

Every entry is held against the tensors that TE's own modules keep, on CPU with TE's kernels replaced
(`tests/fp8/test_te_modules.py`), for `--fp8-recipe dsv3`, for TE's own block scaling and for bf16. Not seen there, and
taken from the documentation: fused attention keeps queries, keys, values, its output and one fp32 number per query and
head; fused SwiGLU and permutation keep what is said below.

Formats: with FP8 the input of a Linear is kept in E4M3 by 128×1, one copy for each Linear that takes it; with
`--fp8-recipe dsv3` attention's output in E5M6 (12 bits) and SwiGLU's input in E4M3, with its output computed again
(report §3.3.3); else all in the compute dtype. Tensor parallelism means sequence parallelism: what is not split by
heads or width is split by sequence.
"""

from collections.abc import Iterator
from dataclasses import replace

from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.kept import Block, Kept

FP32, INT64 = 4, 8
SCALES = 1 + 4 / 128  # bytes of an E4M3 element with its share of a tile's scale
E5M6 = 1.5 + 4 / 128


def blocks(job: Job, stage: Stage) -> list[Block]:
    """See `activations.blocks`."""
    row = []
    for _ in range(stage.dense):
        row += [_attention(job), _dense_mlp(job)]
    for _ in range(stage.moe):
        row += [_attention(job), _moe(job)]
    if stage.head:
        row.append(_final_norm(job, "head"))
    for _ in range(stage.mtp):
        row += [_mtp_input(job), _attention(job), _moe(job), _final_norm(job, "mtp")]
    if stage.head:
        row.append(_head(job, 1 + job.sizes.mtp_num_layers))
    if "full" in job.recompute:
        # Of a layer only its input is kept; one layer's own is there while it runs backward.
        layers = stage.dense + stage.moe
        again = 2 * round(job.recomputed_layers(layers))  # two blocks per layer
        whole = again == 2 * layers
        again_row = [_only_input(job, block) if whole or i < again else block for i, block in enumerate(row)]
        row = _together(row, again_row, 2 * layers, 2 * job.recompute_together)
    return [_on_gpu(job, block) for block in row] if job.offload_modules else row


# What `--offload-modules` sends to host memory: part, beginning of the name.
OFFLOADED = {
    "attn_norm": (("norm", "residual, 1/rms"),),
    "qkv_linear": (("attention", "input of the down projections"),),
    "core_attn": (("attention", "queries, keys, values"),),
    "attn_proj": (("attention", "output"),),
    "mlp_norm": (("norm", "input of router and experts"),),
    "expert_fc1": (("routed_experts", "dispatched inputs"),),
    "moe_act": (("routed_experts", "SwiGLU"),),
}


def is_offloaded(job: Job, tensor: Kept) -> bool:
    """Whether it waits for the backward in host memory."""
    places = [place for name in job.offload_modules for place in OFFLOADED[name]]
    return any(tensor.part == part and tensor.name.startswith(name) for part, name in places)


def _on_gpu(job: Job, block: Block) -> Block:
    """Without what is in host memory but while the block itself runs."""
    stay = tuple(tensor for tensor in block.kept if not is_offloaded(job, tensor))
    gone = block.size - sum(tensor.bytes for tensor in stay)
    return Block(stay, block.deferred, block.forward + gone, block.backward + gone)


def offloaded(job: Job, stage: Stage) -> float:
    """Bytes of a microbatch that a stage sends to host memory, and fetches in the backward."""
    row = blocks(replace(job, offload_modules=frozenset()), stage) if job.offload_modules else []
    return sum(tensor.bytes for block in row for tensor in block.kept if is_offloaded(job, tensor))


def _only_input(job: Job, block: Block) -> Block:
    if any(tensor.part in ("head", "mtp") for tensor in block.kept):
        return block
    size = (
        job.precision.compute * job.sizes.hidden_size * job.tokens / job.layout.tp / 2
    )  # two blocks per layer
    kept = (Kept("layer", "input", size),)
    return Block(kept, block.deferred, block.forward + block.size, block.backward + 2 * block.size)


def _together(row: list[Block], again: list[Block], end: int, size: int) -> list[Block]:
    """So many blocks after one another, up to `end`, are computed again at once: of their inputs the first layer's is
    kept, and what they keep themselves is there until they run backward."""
    found = list(again)
    for first in range(0, end, size) if size > 2 else ():
        there = 0.0
        for i in range(first, min(first + size, end)):
            kept = again[i].kept if i < first + 2 else ()
            layers_before = there if i % 2 == 0 else there - row[i - 1].size  # its own layer's is counted
            found[i] = replace(again[i], kept=kept, backward=again[i].backward + layers_before)
            there += row[i].size
    return found


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
    cached, rope = _linear_input(job), s.qk_pos_emb_head_dim
    up_again = "mla_up_proj" in again
    copies = 2 if job.precision.fp8 else 1  # both down projections quantise the norm's output

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "residual, 1/rms", (e * h + FP32) / tp
        yield (
            "attention",
            "input of the down projections",
            0 if "layernorm" in again else copies * cached * h / tp,
        )
        if up_again:
            yield "attention", "latents and rope part", e * (q_rank + kv_rank + rope) / tp
        else:
            yield "attention", "latents, 1/rms", (e * (q_rank + kv_rank) + 2 * FP32) / tp
            yield "attention", "inputs of the up projections", cached * (q_rank + kv_rank)
            yield "attention", "queries, keys, values", e * heads * (2 * qk + v)
            yield "attention", "rope tables", 4 * e * rope / job.micro_batch_size
        yield "attention", "row sums of the softmax", 0 if "core_attn" in again else FP32 * heads
        # Attention's own backward needs its output, which is also the next linear layer's input (R§3.3.3).
        yield "attention", "output", (E5M6 if job.precision.fp8_caches else e) * heads * v

    inputs = copies * h / tp + q_rank + kv_rank + heads * v
    outputs = (q_rank + kv_rank + rope) / tp + heads * (qk + s.qk_head_dim + v) + h / tp
    workspace = e * heads * (2 * qk + 2 * v)
    return _block(job, kept(), cached * inputs + cached * outputs, workspace, 2 * workspace)


def _swiglu(job: Job, width: float, again: bool) -> float:
    """SwiGLU's input, and the next Linear's unless it is computed `again`."""
    if job.precision.fp8_caches:
        return SCALES * 2 * width
    return job.precision.compute * 2 * width + (0 if again else _linear_input(job) * width)


def _dense_mlp(job: Job) -> Block:
    """The norm is part of the first Linear, so that nothing computes it again alone."""
    s, e, tp = job.sizes, job.precision.compute, job.layout.tp
    cached, width = _linear_input(job), s.ffn_hidden_size / tp
    again = "mlp" in job.recompute

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "residual", e * s.hidden_size / tp
        if not again:
            yield "dense_mlp", "input, 1/rms", (cached * s.hidden_size + FP32) / tp
            yield "dense_mlp", "SwiGLU", _swiglu(job, width, again=False)

    workspace = e * (4 * width + 2 * s.hidden_size)
    return _block(job, kept(), cached * (2 * s.hidden_size + 3 * width), workspace, 1.5 * workspace)


def _moe(job: Job) -> Block:
    s, e, tp = job.sizes, job.precision.compute, job.layout.tp
    h, cached, shared = s.hidden_size, _linear_input(job), s.moe_shared_expert_intermediate_size / tp
    routed = job.routed_tokens / job.tokens
    shared_again = "shared_experts" in job.recompute
    act_again = "moe_act" in job.recompute
    all_again = "moe" in job.recompute

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "norm", "residual", e * h / tp
        norm_again = "layernorm" in job.recompute
        # Router and shared expert keep the same tensor, in the compute dtype with FP8 too.
        yield "norm", "input of router and experts, 1/rms", 0 if norm_again else (e * h + FP32) / tp
        if all_again:
            return
        yield "router", "scores, map, indices", _router(job) / tp
        yield "routed_experts", "weights of the rows", FP32 * routed
        yield "routed_experts", "dispatched inputs", cached * h * routed
        yield "routed_experts", "SwiGLU", _swiglu(job, job.expert_width, act_again) * routed
        yield "shared_experts", "SwiGLU", 0 if shared_again else _swiglu(job, shared, again=False)

    deferred = cached * ((2 * h + 3 * job.expert_width) * routed + 2 * h + 3 * shared)
    workspace = e * (2 * h + 3 * job.expert_width) * routed
    return _block(job, kept(), deferred, workspace, 1.2 * workspace)


def _router(job: Job) -> float:
    """Logits and scores, what the choice among them was sorted by, the map; the weights; the order of the rows."""
    experts, topk = job.sizes.num_moe_experts, job.sizes.moe_router_topk
    chosen = (2 * FP32 + INT64 + 1) * experts + FP32 * (topk + 2)
    return chosen + INT64 * (experts + topk)


def _final_norm(job: Job, part: str) -> Block:
    """Of the main model, or of an MTP layer; its output is the head's input."""
    e, h, tp = job.precision.compute, job.sizes.hidden_size, job.layout.tp
    return _block(job, iter([(part, "final norm", (e * h + FP32) / tp)]))


def _mtp_input(job: Job) -> Block:
    e, h, tp = job.precision.compute, job.sizes.hidden_size, job.layout.tp

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "mtp", "embedding and hidden states, 1/rms", 2 * (e * h + FP32) / tp
        yield "mtp", "joined input of the projection", _linear_input(job) * 2 * h / tp

    return _block(job, kept(), _linear_input(job) * 3 * h)


def _head(job: Job, num_heads: int) -> Block:
    """The head's input and its softmax, in fp32: Megatron's cross-entropy, fused or not, begins with fp32 logits."""
    e, vocab, h, tp = job.precision.compute, job.sizes.padded_vocab_size, job.sizes.hidden_size, job.layout.tp

    def kept() -> Iterator[tuple[str, str, float]]:
        yield "head", "input", e * h * num_heads / tp
        yield "head", "softmax", FP32 * vocab / tp * num_heads

    return _block(job, kept(), 0, FP32 * vocab / tp, FP32 * vocab / tp)
