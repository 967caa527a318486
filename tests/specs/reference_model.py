"""An independent model for the tests: transformers' DeepSeek-V3, loaded from a checkpoint as released.

Where transformers does not do what the report says, the part is replaced by `ReportGate` below. The
differences:

- Equal scores: transformers takes `torch.topk(sorted=False)`, whose choice among equals is unspecified. Here
  the lower index wins, as in our router.
- transformers computes no balance loss. Here the gate computes the sequence-wise one (report eq. 17–20).
- Older transformers masked the groups that are not kept with 0.0, so that experts with negative biased scores
  in kept groups lost against those; the installed one masks with −inf, as the released code does. `mask` of
  `ReportGate` shows that the tests would notice.

Everything else (MLA, YaRN, experts, MTP layer) is transformers' own.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)

from dsv3_megatron.convert.hf_names import to_hf


def hf_config(config: Any) -> DeepseekV3Config:
    """transformers' configuration of the model that a (Megatron) MLATransformerConfig describes."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rotary_base)}
    if config.rope_type == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": config.rotary_scaling_factor,
            "original_max_position_embeddings": config.original_max_position_embeddings,
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
            "mscale": config.mscale,
            "mscale_all_dim": config.mscale_all_dim,
        }
    moe = config.num_moe_experts is not None
    return DeepseekV3Config(
        vocab_size=96,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        moe_intermediate_size=config.moe_ffn_hidden_size or 1,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        n_shared_experts=config.moe_shared_expert_intermediate_size // config.moe_ffn_hidden_size
        if moe
        else 1,
        n_routed_experts=config.num_moe_experts or 1,
        routed_scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_pos_emb_head_dim,
        v_head_dim=config.v_head_dim,
        qk_nope_head_dim=config.qk_head_dim,
        n_group=config.moe_router_num_groups or 1,
        topk_group=config.moe_router_group_topk or 1,
        num_experts_per_tok=config.moe_router_topk,
        first_k_dense_replace=config.moe_layer_freq.index(1) if moe else config.num_layers,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters=rope,
        max_position_embeddings=128,
        attn_implementation="eager",
        num_nextn_predict_layers=config.mtp_num_layers or 0,
    )


class ReportGate(DeepseekV3TopkRouter):
    """Routing token by token from the report (§2.1.2), with the balance loss that transformers lacks."""

    mask = float("-inf")

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states: [b, s, h] → logits [b·s, E], weights [b·s, K], indices [b·s, K]."""
        batch = hidden_states.shape[0]
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim).float(), self.weight.float())
        scores = logits.sigmoid()
        chosen, weights = [], []
        for token in scores:
            experts = self._choose((token.detach() + self.e_score_correction_bias).tolist(), limited=True)
            gates = token[experts]
            chosen.append(experts)
            weights.append(gates / gates.sum() * self.routed_scaling_factor)
        self.balance_loss = sum(self._balance(sequence) for sequence in scores.chunk(batch)) / batch
        return logits, torch.stack(weights), torch.tensor(chosen)

    def _choose(self, biased: list[float], limited: bool) -> list[int]:
        size = self.num_experts // self.num_group
        if limited:
            groups = [sorted(biased[g * size : (g + 1) * size])[-2:] for g in range(self.num_group)]
            best = sorted(range(self.num_group), key=lambda g: (-sum(groups[g]), g))[: self.topk_group]
            biased = [score if i // size in best else self.mask for i, score in enumerate(biased)]
        return sorted(range(self.num_experts), key=lambda i: (-biased[i], i))[: self.top_k]

    def _balance(self, scores: Tensor) -> Tensor:
        """Σ f_i·P_i of one sequence's scores [s, E]; f_i counts the best K unbiased scores of each token."""
        length = scores.shape[0]
        counts = torch.zeros(self.num_experts)
        for token in scores.tolist():
            counts[self._choose(token, limited=False)] += 1
        f = counts * self.num_experts / (self.top_k * length)
        p = (scores / scores.sum(-1, keepdim=True)).mean(0)
        return (f * p).sum()


class ReferenceModel(torch.nn.Module):
    """transformers' model, and its MTP layers as modules that can be trained.

    Args:
        config: a (Megatron) MLATransformerConfig.
        weights: full fp32 tensors by our global names; they reach transformers through a safetensors file
            under the released names, so that those names are checked by transformers' own loader.
        report_gate: replace transformers' gates by `ReportGate`.
    """

    def __init__(self, config: Any, weights: dict[str, Tensor], folder: Path, report_gate: bool):
        super().__init__()
        self.num_layers = config.num_layers
        tensors = {}
        for name, weight in weights.items():
            parts = to_hf(name, self.num_layers)
            for part, tensor in zip(parts, weight.chunk(len(parts)), strict=True):
                tensors[part] = tensor.contiguous()
        main = {n: t for n, t in tensors.items() if not n.startswith(f"model.layers.{self.num_layers}.")}
        save_file(main, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf_config(config).to_dict()))
        self.main, report = DeepseekV3ForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
            report
        )
        self.mtp: Any = None
        if config.mtp_num_layers:
            self.mtp = MtpLayer(
                self.main.config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, self._mtp_layer_number(config)
            )
            self._load_mtp({n: t for n, t in tensors.items() if n not in main})
        if report_gate:
            for module in self.modules():
                if isinstance(module, DeepseekV3TopkRouter):
                    module.__class__ = ReportGate

    def _mtp_layer_number(self, config: Any) -> int:
        """Layer number by which transformers makes the MTP layer MoE or, in a dense model, dense."""
        return self.num_layers - (config.num_moe_experts is None)

    def _load_mtp(self, tensors: dict[str, Tensor]) -> None:
        """Load layer `num_layers` of the release into transformers' MtpLayer, which stacks the experts."""
        outside = ("enorm", "hnorm", "eh_proj", "post_norm")
        own, experts = {}, {}
        for released, tensor in tensors.items():
            name = released.removeprefix(f"model.layers.{self.num_layers}.")
            name = name.replace("shared_head.norm", "post_norm")
            if ".experts." in name:
                experts[name] = tensor
            else:
                own[name if name.startswith(outside) else f"mtp_block.{name}"] = tensor
        numbers = sorted({int(name.split(".")[2]) for name in experts})
        for target, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            stack = [torch.cat([experts[f"mlp.experts.{e}.{p}.weight"] for p in parts]) for e in numbers]
            if stack:
                own[f"mtp_block.mlp.experts.{target}"] = torch.stack(stack)
        self.mtp.load_state_dict(own)

    def gates(self) -> list[ReportGate]:
        """The gates, in order of layers."""
        return [module for module in self.modules() if isinstance(module, ReportGate)]

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Main loss per token [b, s], MTP loss per token [b, s] (its last column, without label, is 0)."""
        hidden = self.main.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        loss = _cross_entropy(self.main.lm_head(hidden), labels)
        if self.mtp is None:
            return loss, None
        length = input_ids.shape[1]
        next_ids, next_labels = (
            torch.cat([x[:, 1:], x.new_zeros(len(x), 1)], 1) for x in (input_ids, labels)
        )
        embeddings = self.main.model.embed_tokens(next_ids)
        causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
        predicted = self.mtp(
            embeddings,
            hidden,
            position_embeddings=self.main.model.rotary_emb(embeddings, position_ids),
            attention_mask=causal,
            position_ids=position_ids,
            past_key_values=None,
        )
        mtp_loss = _cross_entropy(self.main.lm_head(predicted), next_labels)
        return loss, torch.cat([mtp_loss[:, :-1], torch.zeros_like(mtp_loss[:, :1])], 1)

    def released_gradients(self) -> dict[str, Tensor]:
        """Gradients of all parameters under the released names, experts and MTP layer included."""
        grads = {}
        for name, parameter in self.main.named_parameters():
            grads.update(_unstack(name, parameter.grad))
        if self.mtp is not None:
            for name, parameter in self.mtp.named_parameters():
                name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
                grads.update(_unstack(f"model.layers.{self.num_layers}.{name}", parameter.grad))
        return grads


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def _unstack(name: str, grad: Tensor | None) -> dict[str, Tensor]:
    """transformers stacks the experts' weights [E, out, in], gate above up; the released files do not."""
    assert grad is not None, name
    stem, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        parts = [(e, *g.chunk(2)) for e, g in enumerate(grad)]
        gates = {f"{stem}.{e}.gate_proj.weight": gate for e, gate, _ in parts}
        return gates | {f"{stem}.{e}.up_proj.weight": up for e, _, up in parts}
    if kind == "down_proj":
        return {f"{stem}.{e}.down_proj.weight": g for e, g in enumerate(grad)}
    return {name: grad}
