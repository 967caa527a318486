"""Seconds of the operators of one layer and microbatch on one rank, from their shapes.

A matrix product takes its FLOPs at an achieved fraction of the peak; norms, SwiGLU, quantisation and copies take
their bytes at HBM's rate; an all-to-all takes the slower of its InfiniBand and its NVLink bytes (R§3.2.2: a token
crosses InfiniBand once per node, and is forwarded over NVLink inside it; Megatron's alltoall sends it once per expert).
"""

from dataclasses import dataclass
from math import comb

from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job


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

    def linear(self, parameters: float, tokens: float, rows_per_gemm: float | None = None) -> float:
        """`tokens` rows through weights of `parameters` elements, in the precision of the linear layers."""
        a = self.gpu.achieved
        fp8 = self.job.precision.fp8
        rate = a.sustained * (self.gpu.fp8 * a.fp8_gemm if fp8 else self.gpu.bf16 * a.bf16_gemm)
        if rows_per_gemm is not None:
            rate *= rows_per_gemm / (rows_per_gemm + a.small_gemm_rows)
        return 2 * parameters * tokens / rate

    def memory(self, bytes_: float) -> float:
        """Reading and writing so many bytes."""
        return bytes_ / (self.gpu.hbm * self.gpu.achieved.hbm)

    # --- layers

    def dense_layer(self) -> LayerTimes:
        """A layer with a dense MLP."""
        s = self.job.sizes
        return LayerTimes(
            *self._attention(), *self._mlp(s.ffn_hidden_size, self.job.tokens / self.job.layout.tp, {"mlp"})
        )

    def moe_layer(self, beside: bool = False) -> LayerTimes:
        """A MoE layer; `beside`: its all-to-alls as slow as they are beside computation."""
        job, s, tp = self.job, self.job.sizes, self.job.layout.tp
        rows = job.routed_tokens * job.layout.ep / s.num_moe_experts
        routed = self._mlp(s.moe_ffn_hidden_size, job.routed_tokens, {"moe"}, rows)
        shared = self._mlp(s.moe_shared_expert_intermediate_size, job.tokens / tp, {"moe", "shared_experts"})
        mlp = tuple(r + t for r, t in zip(routed, shared, strict=True))
        there = self.all_to_all(self._dispatch_bytes, beside)
        back = self.all_to_all(2.0, beside, back=True)
        return LayerTimes(
            *self._attention(),
            *mlp,  # type: ignore[misc]
            dispatch=there,
            combine=back,
            dispatch_b=back,
            combine_b=there,
            again=there + back if job.recompute & {"full", "moe"} else 0,
        )

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
        core_f = core_flops / (self.gpu.bf16 * a.attention_forward * a.sustained)
        core_b = 2.5 * core_flops / (self.gpu.bf16 * a.attention_backward * a.sustained)
        traffic_f = 2 * (
            6 * heads * qk + 5 * heads * (s.qk_head_dim + s.v_head_dim) / 2 + 3 * heads * s.v_head_dim
        )
        traffic_f = tokens * (traffic_f + 2 * 6 * s.hidden_size / tp + 8 * (q_rank + kv_rank) / tp)
        traffic_w = (
            tokens * 3 * (q_rank + kv_rank + heads * (qk + s.qk_head_dim + 2 * s.v_head_dim) + s.hidden_size)
        )
        collectives = 4 * self.tensor_parallel(2)  # gather and scatter around attention and around the MLP
        collectives += self.context_parallel(2 * heads * (qk + s.v_head_dim))
        f = gemm + core_f + self.memory(traffic_f) + collectives
        b = gemm + core_b + self.memory(2 * traffic_f) + collectives
        if "full" in recompute:
            b += f
        else:
            if "mla_up_proj" in recompute:
                b += self.linear(up, tokens) + self.memory(traffic_f / 2)
            if "core_attn" in recompute:
                b += core_f
            if "layernorm" in recompute:
                b += self.memory(tokens * 2 * 2 * 2 * s.hidden_size / tp)
        return f, b, gemm + self.memory(traffic_w)

    def _mlp(
        self, width: int, tokens: float, recomputed_by: set[str], rows: float | None = None
    ) -> tuple[float, float, float]:
        """Forward, input backward, weight backward of a SwiGLU MLP of `width` on `tokens` of this rank.

        With tensor parallelism a rank has all tokens and a part of the width, which is as much work.
        """
        s, recompute = self.job.sizes, self.job.recompute
        gemm = self.linear(3 * s.hidden_size * width, tokens, rows)
        cache = 1 if self.job.precision.fp8 else 2
        swiglu = tokens * width * (2 * 2 * 2 + cache)  # both halves written and read, the product written
        edge = tokens * s.hidden_size * (2 + 2 * cache)
        f = gemm + self.memory(swiglu + edge)
        b = gemm + self.memory(2 * (swiglu + edge))
        if recompute & (recomputed_by | {"full"}):
            b += f
        elif "moe_act" in recompute:
            b += self.memory(swiglu / 2)
        return f, b, gemm + self.memory(tokens * 3 * (2 * s.hidden_size + 3 * width) * cache / 2)

    # --- ends of the model

    def head(self, num_heads: int) -> tuple[float, float, float]:
        """Forward, full backward and weight gradients of the output head, `num_heads` times, in BF16."""
        job, s = self.job, self.job.sizes
        rows, tp = job.tokens * num_heads, job.layout.tp
        gemm = 2 * rows * s.hidden_size * s.padded_vocab_size / tp
        gemm /= self.gpu.bf16 * self.gpu.achieved.bf16_gemm * self.gpu.achieved.sustained
        softmax = self.memory(rows * s.padded_vocab_size / tp * 12)
        return gemm + softmax, 2 * gemm + softmax, gemm

    def mtp_projection(self) -> tuple[float, float, float]:
        """Forward, full backward and weight gradients of an MTP layer's projection."""
        s = self.job.sizes
        gemm = self.linear(2 * s.hidden_size**2, self.job.tokens / self.job.layout.tp)
        return gemm, 2 * gemm, gemm

    # --- communication

    def all_to_all(self, bytes_per_element: float, beside: bool = False, back: bool = False) -> float:
        """Dispatch of one layer, or (`back`) combine."""
        job, gpu, a = self.job, self.gpu, self.gpu.achieved
        if job.layout.ep == 1:
            return 0
        tokens = job.tokens / job.layout.tp * job.load_imbalance
        size = bytes_per_element * job.sizes.hidden_size * tokens
        over_ib, over_nvlink = copies(job, gpu.nvlink_domain, back)
        latency = tokens * a.beside_token if beside and over_ib else a.latency
        ib = over_ib * size / (gpu.ib * (a.beside_ib if beside else a.ib))
        nvlink = over_nvlink * size / (gpu.nvlink * a.nvlink)
        # In chunks: the first one's first hop and the last one's second have nothing beside them.
        edges = a.latency + min(ib, nvlink) / job.dispatch_chunks if job.dispatcher == "two_hop" else 0
        return latency + max(ib, nvlink) + edges

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
        inside = span <= self.gpu.nvlink_domain
        return self.gpu.nvlink * self.gpu.achieved.nvlink if inside else self.gpu.ib * self.gpu.achieved.ib

    def collective(self, bytes_: float, num_ranks: int, span: int) -> float:
        """Reduce-scatter or all-gather of `bytes_` over `num_ranks` that are spread over `span` ranks."""
        return bytes_ * (num_ranks - 1) / num_ranks / self._rate(span) if num_ranks > 1 else 0


def destinations(job: Job, domain: int) -> tuple[float, float]:
    """Expected number of other nodes and of other ranks that a token's experts are on, with even load.

    A node is an NVLink domain. Routing keeps a token to `group_topk` of the expert groups (R§2.1.2); groups and
    experts lie in order over the ranks. The second number counts ranks of the token's own and of all other nodes.
    """
    s, ep = job.sizes, job.layout.ep
    groups, chosen = job.moe_router_num_groups, job.moe_router_group_topk
    num_nodes = max(1, ep // domain)
    per_group = s.moe_router_topk / chosen
    nodes = _distinct(groups, chosen, per_group, num_nodes)
    ranks = _distinct(groups, chosen, per_group, ep)
    return nodes * (num_nodes - 1) / num_nodes if num_nodes > 1 else 0, ranks * (ep - 1) / ep


def copies(job: Job, domain: int, back: bool = False) -> tuple[float, float]:
    """Copies of a token that cross InfiniBand and NVLink on the way to the experts, or (`back`) of the outputs.

    "flex" (DeepEP): a node and a rank once. "two_hop": the same, but back a row per expert crosses NVLink, so that the
    sum of a node has one order; and what has come to a rank with its own index stays there. "alltoall": one per expert.
    """
    topk, ep = job.sizes.moe_router_topk, job.layout.ep
    num_nodes = max(1, ep // domain)
    other_index = 1 - num_nodes / ep
    if job.dispatcher == "alltoall":
        return topk * (1 - 1 / num_nodes), topk / num_nodes * other_index
    nodes, ranks = destinations(job, domain)
    if job.dispatcher == "two_hop":
        ranks = (topk if back else ranks * ep / (ep - 1)) * other_index
    return nodes, ranks


def _distinct(groups: int, chosen: int, per_group: float, places: int) -> float:
    """Expected number of `places` hit by `per_group` experts in each of `chosen` of `groups` groups."""
    if places <= groups:
        mine = groups // places
        missed = comb(groups - mine, chosen) / comb(groups, chosen) if groups - mine >= chosen else 0
        return places * (1 - missed)
    inside = places / groups
    return chosen * inside * (1 - (1 - 1 / inside) ** per_group)
