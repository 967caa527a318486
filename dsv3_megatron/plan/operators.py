"""Seconds of the operators of one layer and microbatch on one rank, from their shapes.

A matrix product takes its FLOPs at an achieved fraction of the peak, a grouped one besides the bytes of its weights;
norms, SwiGLU, quantisation and copies take their bytes at HBM's rate. Dispatch and combine: `token_exchange.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dsv3_megatron.plan import token_exchange
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job

# Bytes read and written per logit, forward and backward. Unfused and Megatron's own: to fp32, maximum, exponentials,
# sum, quotient, and back through them, in more or fewer kernels; Transformer Engine's: twice over the logits, the
# gradient in their place.
CROSS_ENTROPY = {"": (34, 20), "native": (22, 12), "te": (8, 4)}


# Bytes per score of the integers and comparisons that a causal mask is made of.
_MASK = 81
# On which Transformer Engine runs the products of single experts.
_STREAMS = 4


class Product(NamedTuple):
    """Seconds of a linear layer: forward, gradient of its input, gradient of its weights."""

    f: float
    b: float
    w: float

    def __add__(self, other: "Product") -> "Product":  # type: ignore[override]
        return Product(self.f + other.f, self.b + other.b, self.w + other.w)


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a layer's operators on all SMs; communication when nothing runs beside it.

    Attributes:
        attention_f, attention_b, attention_w: MLA with its norms, router and shared expert apart; `_b` is the
            input part of the backward with what is recomputed, `_w` the weight part.
        mlp_f, mlp_b, mlp_w: dense MLP, or routed and shared experts.
        dispatch, combine: all-to-alls of the forward; `dispatch_b`, `combine_b` of the backward (the gradient goes
            through combine first). 0 in a dense layer.
        again: communication that full recompute repeats in the backward.
    """

    attention_f: float
    attention_b: float
    attention_w: float
    mlp_f: float
    mlp_b: float
    mlp_w: float
    dispatch: float = 0
    combine: float = 0
    dispatch_b: float = 0
    combine_b: float = 0
    again: float = 0

    @property
    def f(self) -> float:
        """Forward, one operator after the other."""
        return self.attention_f + self.dispatch + self.mlp_f + self.combine

    @property
    def w(self) -> float:
        return self.attention_w + self.mlp_w

    @property
    def b(self) -> float:
        """Full backward, one operator after the other."""
        backward = self.combine_b + self.mlp_b + self.dispatch_b + self.attention_b + self.again
        return backward + self.w


@dataclass(frozen=True)
class Operators:
    """The operators of one job on one kind of GPU."""

    job: Job
    gpu: Gpu

    # --- rates

    @cached_property
    def _rate_of_linear(self) -> float:
        """FLOP/s of products in the precision of the linear layers."""
        a, p, gpu = self.gpu.achieved, self.job.precision, self.gpu
        if p.fp4 and gpu.fp4:
            return gpu.sustained * gpu.fp4 * a.fp4_gemm
        return gpu.sustained * (gpu.fp8 * a.fp8_gemm if p.fp8 else gpu.bf16 * a.bf16_gemm)

    def linear(self, parameters: float, rows: float) -> Product:
        """`rows` rows through weights of `parameters` elements, in the precision of the linear layers."""
        product = 2 * parameters * rows / self._rate_of_linear
        return Product(product, product, product)

    def grouped(self, parameters: float, rows: float, experts: int) -> Product:
        """`rows` rows over all `experts`, each with weights of so many elements.

        Weights are read once for the few rows of an expert, and their gradient is read and written: this is what is
        left of the measured slowness of few rows (SimuMax's grouped products by shape), and needs no constant of its
        own.
        """
        p, dense = self.job.precision, self.linear(parameters, rows)
        tiled = self.linear(parameters, rows + self._empty_rows * experts)
        read = self.memory(parameters * experts * (1 if p.fp8 else p.compute))
        added = self.memory(parameters * experts * 2 * p.main_gradient)
        apart = 0 if self.job.software.own_kernels else experts * self.gpu.achieved.ramp / _STREAMS
        return Product(tiled.f + read + apart, tiled.b + read + apart, dense.w + added + apart)

    @property
    def _empty_rows(self) -> float:
        """Rows of an expert's last tile that hold no token: half a tile, unless all experts have as many as one
        another (tokens dropped and padded). DeepSeek's kernels are calibrated with theirs.
        """
        even = self.job.capacity_factor is not None or self.job.software.own_kernels
        return 0 if even else self.gpu.achieved.tile / 2

    def memory(self, bytes_: float) -> float:
        """Reading and writing so many bytes."""
        return bytes_ / (self.gpu.hbm * self.gpu.achieved.hbm)

    # --- layers

    def dense_layer(self) -> LayerTimes:
        """A layer with a dense MLP."""
        s, tp = self.job.sizes, self.job.layout.tp
        return LayerTimes(*self._attention(), *self._mlp(s.ffn_hidden_size / tp, self.job.tokens, "mlp"))

    def moe_layer(self, beside: bool = False) -> LayerTimes:
        """A MoE layer; `beside`: its all-to-alls as slow as they are beside computation."""
        job, s, tp = self.job, self.job.sizes, self.job.layout.tp
        routed = self._mlp(job.expert_width, job.routed_tokens, "moe", job.local_experts)
        shared = self._mlp(s.moe_shared_expert_intermediate_size / tp, job.tokens, "shared_experts")
        there = self.all_to_all(self._dispatch_bytes, beside)
        back = self.all_to_all(2.0, beside, back=True)
        mlp = [r + t for r, t in zip(routed, self._not_beside(shared, there + back), strict=True)]
        order = token_exchange.permutations(job) / (self.gpu.hbm * self.gpu.achieved.permutation)
        mlp[0], mlp[1] = mlp[0] + order, mlp[1] + order
        # Megatron's all-to-all sends the probabilities in one of their own, and their gradients back.
        probabilities = self.gpu.achieved.latency if there and job.dispatcher == "alltoall" else 0
        return LayerTimes(
            *self._attention(),
            *mlp,  # type: ignore[misc]
            dispatch=there + probabilities,
            combine=back,
            dispatch_b=back + probabilities,
            combine_b=there,
            again=there + probabilities + back + order if "moe" in job.recompute else 0,
        )

    def _not_beside(
        self, shared: tuple[float, float, float], communicating: float
    ) -> tuple[float, float, float]:
        """What of the shared expert is not hidden by dispatch and combine, which leave it the other SMs."""
        if not self.job.shared_expert_overlap:
            return shared
        gpu = self.gpu
        taken = self.job.communication_sms or gpu.achieved.communication_sms
        beside = communicating * (1 - taken / gpu.sms)
        f, b, w = shared
        hidden_b = min(b, beside)
        return max(0, f - beside), b - hidden_b, max(0, w - (beside - hidden_b))

    @property
    def _dispatch_bytes(self) -> float:
        """Per element: E4M3 with one scale per 128, or BF16 (R§3.3.3)."""
        return 1 + 4 / 128 if self.job.precision.fp8_dispatch else 2.0

    def _attention(self) -> tuple[float, float, float]:
        """Forward, input backward, weight backward of MLA with its norms, and the tensor-parallel collectives."""
        job, s, a = self.job, self.job.sizes, self.gpu.achieved
        tp, tokens, recompute = job.layout.tp, job.tokens, job.recompute
        heads, qk = s.num_attention_heads / tp, s.qk_head_dim + s.qk_pos_emb_head_dim
        q_rank, kv_rank = s.q_lora_rank or 0, s.kv_lora_rank
        down = s.hidden_size * (q_rank + kv_rank + s.qk_pos_emb_head_dim)
        up = (q_rank or s.hidden_size) * heads * qk + kv_rank * heads * (s.qk_head_dim + s.v_head_dim)
        out = heads * s.v_head_dim * s.hidden_size
        # The down projections are whole on every tensor-parallel rank, which has a part of the sequence.
        gemm = self.linear(down, tokens / tp) + self.linear(up + out, tokens)
        core_flops = heads * (qk + s.v_head_dim) * s.seq_length * tokens  # causal: half of 2·2
        core_f = self._attending(core_flops, a.attention_forward, qk + s.v_head_dim)
        core_b = self._attending(2.5 * core_flops, a.attention_backward, 3 * qk + 2 * s.v_head_dim)
        if not job.software.fused_attention:
            core_f, core_b = self._unfused_attention(heads, core_flops)
        traffic_f = 2 * (
            6 * heads * qk + 5 * heads * (s.qk_head_dim + s.v_head_dim) / 2 + 3 * heads * s.v_head_dim
        )
        traffic_f = tokens * (traffic_f + 2 * 6 * s.hidden_size / tp + 8 * (q_rank + kv_rank) / tp)
        traffic_w = (
            tokens * 3 * (q_rank + kv_rank + heads * (qk + s.qk_head_dim + 2 * s.v_head_dim) + s.hidden_size)
        )
        collectives = 4 * self.tensor_parallel(2)  # gather and scatter around attention and around the MLP
        collectives += self.context_parallel(2 * heads * (qk + s.v_head_dim))
        f = gemm.f + core_f + self.memory(traffic_f) + collectives
        b = gemm.b + core_b + self.memory(2 * traffic_f) + collectives
        if "mla_up_proj" in recompute:
            b += self.linear(up, tokens).f + self.memory(traffic_f / 2)
        if "core_attn" in recompute:
            b += core_f
        if "layernorm" in recompute:
            b += self.memory(tokens * 2 * 2 * 2 * s.hidden_size / tp)
        return f, b, gemm.w + self._transposing(traffic_w)

    def _attending(self, flops: float, reached: float, products: int) -> float:
        """Fused attention: its products, and besides them an exponential per score.

        Neither FP8 operands nor faster tensor cores change the exponentials: of Blackwell's forward they are what its
        products do not take (FlashAttention-4: 16 a clock and SM against 8192 FLOPs; two products of 192 and 128).

        Args:
            reached: of the BF16 peak, measured where an SM has 16 exponentials a clock.
            products: FLOPs of a score, halved.
        """
        job, gpu = self.job, self.gpu
        exponentials = gpu.achieved.flops_per_clock / (2 * products) / 16
        others = (1 / reached - exponentials) * (gpu.bf16 / gpu.fp8 if job.precision.fp8_attention else 1)
        share = others + exponentials * 16 / gpu.exponentials
        return flops / (gpu.bf16 * gpu.sustained) * share

    def _unfused_attention(self, heads: float, causal_flops: float) -> tuple[float, float]:
        """Forward and backward over whole matrices of scores: four passes over them, and seven back; and the causal
        mask, which is made for each forward (Transformer Engine's `UnfusedDotProductAttention`, `get_full_mask`).
        """
        job, a = self.job, self.gpu.achieved
        seq = job.sizes.seq_length
        scores = heads * seq * job.tokens * job.precision.compute
        products = 2 * causal_flops / (self.gpu.bf16 * a.bf16_gemm * self.gpu.sustained)
        rate = self.gpu.hbm * a.scores
        return products + 4 * scores / rate + self.memory(_MASK * seq**2), 2 * products + 7 * scores / rate

    def _mlp(self, width: float, tokens: float, module: str, experts: int = 1) -> tuple[float, float, float]:
        """Forward, input backward, weight backward of `experts` SwiGLU MLPs of `width`, on `tokens` rows in all."""
        s, recompute = self.job.sizes, self.job.recompute
        parameters = 3 * s.hidden_size * width
        gemm = self.linear(parameters, tokens) if experts == 1 else self.grouped(parameters, tokens, experts)
        cache = 1 if self.job.precision.fp8 else 2
        swiglu = tokens * width * (2 * 2 * 2 + cache)  # both halves written and read, the product written
        alone = self.job.precision.fp8 and not self.job.software.own_kernels
        # In BF16 first, then by rows and by columns; each expert by kernels of its own.
        quantised = tokens * width * (2 + 2 + cache) if alone else 0
        ramps = 2 * experts * self.gpu.achieved.ramp if alone and experts > 1 else 0
        again = 0 if "online_quantization" in self.job.hardware and self.job.precision.fp8 else 2 * cache
        edge = tokens * s.hidden_size * (2 + again)
        f = gemm.f + self.memory(swiglu + quantised + edge) + ramps
        b = gemm.b + self.memory(2 * (swiglu + edge)) + ramps
        if module in recompute or (module == "shared_experts" and "moe" in recompute):
            b += f
        elif "moe_act" in recompute:
            b += self.memory(swiglu / 2)
        traffic_w = tokens * 3 * (2 * s.hidden_size + 3 * width) * cache / 2
        return f, b, gemm.w + self._transposing(traffic_w)

    def _transposing(self, bytes_: float) -> float:
        """Quantising FP8 activations again by the other axis for weight gradients."""
        needed = self.job.precision.fp8 and "transposed_fp8_reads" not in self.job.hardware
        return self.memory(bytes_) if needed else 0

    # --- ends of the model

    def head(self, num_heads: int) -> tuple[float, float, float]:
        """Forward, full backward and weight gradients of the output head and cross-entropy, `num_heads` times."""
        job, s = self.job, self.job.sizes
        rows, tp = job.tokens * num_heads, job.layout.tp
        gemm = 2 * rows * s.hidden_size * s.padded_vocab_size / tp
        in_bf16 = self.gpu.bf16 * self.gpu.achieved.bf16_gemm * self.gpu.sustained
        gemm /= self._rate_of_linear if job.precision.fp8_head else in_bf16
        # DeepSeek's loss is unpublished, and Transformer Engine's is younger than its run (TE 2.0).
        traffic = CROSS_ENTROPY["native" if job.software.own_kernels else job.software.cross_entropy]
        loss_f, loss_b = (self.memory(rows * s.padded_vocab_size / tp * bytes_) for bytes_ in traffic)
        return gemm + loss_f, 2 * gemm + loss_b, gemm

    def mtp_projection(self) -> tuple[float, float, float]:
        """Forward, full backward and weight gradients of an MTP layer's projection."""
        s, tp = self.job.sizes, self.job.layout.tp
        gemm = self.linear(2 * s.hidden_size**2 / tp, self.job.tokens)
        return gemm.f, gemm.b + gemm.w, gemm.w

    # --- communication

    def all_to_all(self, bytes_per_element: float, beside: bool = False, back: bool = False) -> float:
        """Dispatch of one layer, or (`back`) combine."""
        return token_exchange.seconds(self.job, self.gpu, bytes_per_element, beside, back)

    def tensor_parallel(self, bytes_per_element: float) -> float:
        """One all-gather or reduce-scatter of the hidden states over the tensor-parallel ranks."""
        tp = self.job.layout.tp
        if tp == 1:
            return 0
        size = bytes_per_element * self.job.tokens * self.job.sizes.hidden_size * (tp - 1) / tp
        return size / self._rate(tp)

    def context_parallel(self, bytes_per_token: float) -> float:
        """Keys and values of the other context-parallel ranks."""
        cp = self.job.layout.cp
        if cp == 1:
            return 0
        return bytes_per_token * self.job.tokens * (cp - 1) / self._rate(cp * self.job.layout.tp)

    def message(self) -> float:
        """Activation or gradient between two stages, over InfiniBand unless all ranks share NVLink."""
        job, a = self.job, self.gpu.achieved
        size = job.precision.compute * job.tokens / job.layout.tp * job.sizes.hidden_size
        return a.latency + size / self._rate(job.layout.num_gpus)

    def _rate(self, span: int) -> float:
        """Bytes per second between ranks `span` apart."""
        inside = span <= token_exchange.nvlink_domain(self.job, self.gpu)
        return self.gpu.nvlink * self.gpu.achieved.nvlink if inside else self.gpu.ib * self.gpu.achieved.ib

    def collective(self, bytes_: float, num_ranks: int, span: int) -> float:
        """Reduce-scatter or all-gather of `bytes_` over `num_ranks` that are spread over `span` ranks."""
        return bytes_ * (num_ranks - 1) / num_ranks / self._rate(span) if num_ranks > 1 else 0
