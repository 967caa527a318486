"""`DSV3Router`: the mathematics of `routing.py` behind the interface of Megatron's router."""

from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsv3_megatron import patching
from dsv3_megatron.specs import routing

__all__ = ["DSV3Router", "PhysicalExperts", "check_config"]

# Megatron computes the mean load in fp32; without this patch integer counts would be rounded on their way.
patching.install(["expert_bias_update"])

# option -> (values that are routing as DeepSeek-V3 does it, what to give instead)
_SUPPORTED = {
    "moe_router_score_function": (("sigmoid", "softmax"), "--moe-router-score-function sigmoid"),
    "moe_router_load_balancing_type": (
        ("seq_aux_loss", ["seq_aux_loss"], "none", ["none"]),
        "--moe-router-load-balancing-type seq_aux_loss",
    ),
    "moe_expert_capacity_factor": ((None,), "no --moe-expert-capacity-factor: no token is dropped"),
    "moe_z_loss_coeff": ((None, 0, 0.0), "no --moe-z-loss-coeff"),
    "moe_input_jitter_eps": ((None, 0, 0.0), "no --moe-input-jitter-eps"),
    "moe_router_fusion": ((False,), "no --moe-router-fusion: the fused kernel scores groups differently"),
    "moe_enable_routing_replay": ((False,), "no --moe-enable-routing-replay"),
    "add_bias_linear": ((False,), "--disable-bias-linear: the gate has no bias but expert_bias"),
}


def check_config(config: TransformerConfig) -> None:
    """Refuse options under which the router would not route as DeepSeek-V3 does.

    Raises:
        ValueError: names the option, its value and what to give.
    """
    for option, (values, advice) in _SUPPORTED.items():
        value = getattr(config, option)
        if value not in values:
            raise ValueError(f"{option}={value!r} is not DeepSeek-V3's routing: use {advice}")
    if config.moe_router_score_function == "softmax":
        _check_softmax(config)
    if config.moe_router_dtype is None and config.params_dtype.itemsize < 4:
        raise ValueError(
            f"moe_router_dtype=None computes the router's logits in {config.params_dtype}, but DeepSeek-V3's "
            "scores are fp32: use --moe-router-dtype fp32"
        )
    routing.check_routing(
        config.num_moe_experts,
        config.moe_router_topk,
        config.moe_router_num_groups,
        config.moe_router_group_topk,
    )


def _check_softmax(config: TransformerConfig) -> None:
    """DeepSeek-V2-Lite's gate, the only one of the family with softmax: over all experts, without groups and bias."""
    for option, values, advice in (
        ("moe_router_pre_softmax", (True,), "--moe-router-pre-softmax: V2's scores are over all experts"),
        (
            "moe_router_num_groups",
            (None, 1),
            "--moe-router-num-groups 1: V2 scores a group by its best expert",
        ),
        ("moe_router_group_topk", (None, 1), "--moe-router-group-topk 1"),
        ("moe_router_enable_expert_bias", (False,), "no --moe-router-enable-expert-bias"),
    ):
        value = getattr(config, option)
        if value not in values:
            raise ValueError(
                f"{option}={value!r} with moe_router_score_function='softmax' is no gate of DeepSeek's: use {advice}, "
                "or --moe-router-score-function sigmoid"
            )


class PhysicalExperts(Protocol):
    """Where the experts are that the router names: the door for redundant experts in a deployment."""

    num_experts: int  # of which there are weights; at least as many as the router names

    def __call__(self, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and logical experts int64 [T, K] → weights and physical ones, distinct per token.

        Any copy of each expert serves. There may be more columns than came: experts that every token gets.
        """


class DSV3Router(TopKRouter):
    """Routes as DeepSeek-V3 does (R§2.1.2) where Megatron's `TopKRouter` differs from it.

    - Groups are scored by their two best experts always; ties go to the lower index
      (`routing.group_limited_topk`).
    - `expert_bias` [E] stays fp32, values included, under `.bfloat16()`, `.half()`, `.to(dtype)`.
    - `local_tokens_per_expert` [E] is int64; padded tokens are not counted.
    - The balance loss is per sequence also where sequences have different numbers of padded tokens.

    With `moe_router_score_function` softmax it is DeepSeek-V2-Lite's gate: the K best of all experts, weighed by their
    scores as they are.

    Tokens are counted where Megatron counts them, in a forward that records a graph: evaluation does not
        count, and under activation recompute (Megatron's and TE's checkpoint run the first forward without a
        graph) only the second forward does. `finalize_model_grads` sums the counts over TP × DP × CP, moves
        the bias, and clears them.
    """

    expert_bias: Tensor | None
    local_tokens_per_expert: Tensor | None
    # Between router and dispatcher, outside training; None where each expert is itself. Scores, bias and counts stay
    # those of the logical experts.
    physical_experts: PhysicalExperts | None = None
    # Experts [S·B, K] int64 of the next forward pass that were chosen before (−1: choose now), set and taken away by
    # whoever replays them; only in a forward pass that records a graph, or scores for one.
    given_experts: Tensor | None = None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        check_config(config)
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        if self.enable_expert_bias:
            self.local_tokens_per_expert = torch.zeros_like(self.expert_bias, dtype=torch.int64)

    def _apply(self, fn, recurse: bool = True):
        # Megatron casts the bias back to fp32 at the next forward, after its low bits are gone.
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.expert_bias = before.to(device=after.device, dtype=torch.float32)
        return self

    def gating(self, input: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled() or self.weight.device.type != "cpu":
            return super().gating(input)
        # Megatron would put the weight on the device anew at each call, and prepare for a backward pass.
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(
            self.config.moe_router_dtype or "", input.dtype
        )
        return torch.matmul(input.to(dtype), self.weight.to(dtype).t())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for each token; attach the balance loss and count tokens when training.

        Args:
            logits: [S, B, E] of this rank (S is the local part under sequence or context parallelism), fp32
                or fp64.
            padding_mask: [S, B] bool, True for padded tokens. Under sequence parallelism it may still cover
                the tokens of all tensor-parallel ranks: Megatron splits it on the first pipeline stage only.

        Returns:
            probs [S·B, E] of the logits' dtype and routing_map [S·B, E] bool.
        """
        seq_length, _, num_experts = logits.shape
        # Contiguous: the mask comes transposed, and its layout would become that of the gradient of the logits.
        valid = None if padding_mask is None else (~self._own_part(padding_mask, seq_length)).contiguous()
        score_function = self.config.moe_router_score_function
        scores = routing.affinity(logits, score_function)
        weights, indices = routing.group_limited_topk(
            scores.flatten(0, 1),
            self.expert_bias,
            self.topk,
            self.config.moe_router_num_groups,
            self.config.moe_router_group_topk,
            self.config.moe_router_topk_scaling_factor or 1.0,
            normalize=score_function == "sigmoid",
            given=self.given_experts,
        )
        probs, routing_map = routing.to_dense(weights, indices, num_experts)
        if torch.is_grad_enabled():
            if self.training:
                probs = self._attach_balance_loss(probs, scores, valid)
            if self.enable_expert_bias:
                counts = routing.count_tokens(routing_map, None if valid is None else valid.flatten())
                self.local_tokens_per_expert += counts
        elif self.physical_experts is not None:
            weights, slots = self.physical_experts(weights, indices)
            return routing.to_dense(weights, slots, self.physical_experts.num_experts)
        return probs, routing_map

    def _own_part(self, padding_mask: Tensor, seq_length: int) -> Tensor:
        """The rows of the mask [S or S·tp, B] that belong to this tensor-parallel rank's tokens."""
        tp_size = self.tp_group.size()
        if padding_mask.shape[0] == seq_length:
            return padding_mask
        if padding_mask.shape[0] != seq_length * tp_size:
            raise ValueError(
                f"padding_mask covers {padding_mask.shape[0]} positions, but this rank routes {seq_length} "
                f"(tensor parallel size {tp_size}): give the mask of the same tokens as input_ids"
            )
        return padding_mask.chunk(tp_size, dim=0)[self.tp_group.rank()]

    def _attach_balance_loss(self, probs: Tensor, scores: Tensor, valid: Tensor | None) -> Tensor:
        """Megatron's way: an identity on `probs` whose backward starts the loss's gradient; logs it too."""
        alpha = self.get_aux_loss_coeff("seq_aux_loss")
        if alpha == 0:
            return probs
        counts, num_tokens = routing.balance_counts(scores, self.topk, valid)
        if self.tp_cp_group.size() > 1:  # the other parts of the same sequences
            whole = torch.cat([counts, num_tokens.unsqueeze(-1)], dim=-1)
            dist.all_reduce(whole, group=self.tp_cp_group)
            counts, num_tokens = whole[:, :-1], whole[:, -1]
        loss = routing.sequence_balance_loss(scores, self.topk, alpha, valid, counts, num_tokens)
        return self.attach_and_log_load_balancing_loss(
            probs,
            alpha,
            loss,
            "seq_load_balancing_loss",
            self.tp_cp_group,
            # Used under per-token loss, where Megatron multiplies it by the group's size again.
            valid_token_count=num_tokens.sum() / self.tp_cp_group.size(),
        )
