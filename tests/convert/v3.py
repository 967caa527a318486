"""DeepSeek-V3's forward pass on released tensors, written from the report and the released inference code's semantics.

Independent of Megatron, transformers and our specs: plain functions on a dict of tensors under their released names.
YaRN is applied as the released code does (mscale² on the softmax scale, plain cos and sin), groups that are not kept
are masked with −inf, the bias takes part in the choice only, ties go to the lower index.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class V3:
    """A model: `config` (config.json) and `tensors` by released name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    mask: float = -math.inf  # score of the groups that are not kept

    def logits(self, ids: Tensor) -> Tensor:
        """ids int64 [s] → fp32 [s, vocabulary]."""
        return self.hidden(ids) @ self["lm_head.weight"].T

    def mtp_logits(self, ids: Tensor) -> Tensor:
        """For positions 0 to s−2 the logits of the token after the next one, fp32 [s−1, vocabulary] (R§2.2)."""
        layer = f"model.layers.{self.config['num_hidden_layers']}."
        embedded = self[f"{layer}embed_tokens.weight"][ids[1:]]
        hidden = self.hidden(ids)[:-1]
        both = torch.cat([self.norm(embedded, layer + "enorm"), self.norm(hidden, layer + "hnorm")], -1)
        x = self.block(both @ self[f"{layer}eh_proj.weight"].T, layer)
        return self.norm(x, layer + "shared_head.norm") @ self[f"{layer}shared_head.head.weight"].T

    def hidden(self, ids: Tensor) -> Tensor:
        x = self["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            x = self.block(x, f"model.layers.{layer}.")
        return self.norm(x, "model.norm")

    def block(self, x: Tensor, layer: str) -> Tensor:
        x = x + self.attention(self.norm(x, layer + "input_layernorm"), layer + "self_attn.")
        y = self.norm(x, layer + "post_attention_layernorm")
        has_experts = f"{layer}mlp.gate.weight" in self.tensors
        return x + (self.moe(y, layer + "mlp.") if has_experts else self.swiglu(y, layer + "mlp."))

    def attention(self, x: Tensor, at: str) -> Tensor:
        c, length = self.config, len(x)
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"] is None:
            q = x @ self[at + "q_proj.weight"].T
        else:
            q = (
                self.norm(x @ self[at + "q_a_proj.weight"].T, at + "q_a_layernorm")
                @ self[at + "q_b_proj.weight"].T
            )
        q = q.view(length, heads, nope + rope)
        compressed = x @ self[at + "kv_a_proj_with_mqa.weight"].T
        latent, k_rope = compressed.split([c["kv_lora_rank"], rope], -1)
        kv = self.norm(latent, at + "kv_a_layernorm") @ self[at + "kv_b_proj.weight"].T
        k_nope, v = kv.view(length, heads, nope + c["v_head_dim"]).split([nope, c["v_head_dim"]], -1)
        q_rope = self.rotate(q[..., nope:])
        k_rope = self.rotate(k_rope[:, None])[:, 0]
        scores = torch.einsum("shd,thd->hst", q[..., :nope], k_nope)
        scores = scores + torch.einsum("shd,td->hst", q_rope, k_rope)
        causal = torch.full((length, length), -math.inf).triu(1)
        weights = (scores * self.softmax_scale() + causal).softmax(-1)
        mixed = torch.einsum("hst,thd->shd", weights, v).reshape(length, -1)
        return mixed @ self[at + "o_proj.weight"].T

    def softmax_scale(self) -> float:
        c = self.config
        scale = (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
        yarn = self.yarn()
        if yarn:
            scale *= (0.1 * yarn["mscale"] * math.log(yarn["factor"]) + 1.0) ** 2
        return scale

    def rotate(self, x: Tensor) -> Tensor:
        """x [s, heads, d]: neighbouring elements are the two parts of a complex number."""
        length, _, dim = x.shape
        frequencies = self.theta() ** -(torch.arange(0, dim, 2).float() / dim)
        yarn = self.yarn()
        if yarn:
            frequencies = self.interpolated(frequencies, yarn, dim)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        turned = torch.view_as_complex(x.reshape(length, -1, dim // 2, 2)) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2)

    def interpolated(self, frequencies: Tensor, yarn: dict[str, Any], dim: int) -> Tensor:
        """Slow rotations are slowed down by `factor`, fast ones kept, those between in part (YaRN)."""

        def dimension(rotations: float) -> float:
            wavelength = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(self.theta()))

        low = max(math.floor(dimension(yarn["beta_fast"])), 0)
        high = min(math.ceil(dimension(yarn["beta_slow"])), dim - 1)
        ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequencies / yarn["factor"] * ramp + frequencies * (1 - ramp)

    def moe(self, x: Tensor, at: str) -> Tensor:
        c = self.config
        scores = (x @ self[at + "gate.weight"].T).sigmoid()
        y = self.swiglu(x, at + "shared_experts.")
        for token in range(len(x)):
            chosen = self.choose((scores[token] + self[at + "gate.e_score_correction_bias"]).tolist())
            gates = scores[token, chosen]
            gates = gates / gates.sum() * c["routed_scaling_factor"]
            for gate, expert in zip(gates, chosen, strict=True):
                y[token] = y[token] + gate * self.swiglu(x[token], f"{at}experts.{expert}.")
        return y

    def choose(self, biased: list[float]) -> list[int]:
        c = self.config
        size = len(biased) // c["n_group"]
        groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c["n_group"])]
        kept = sorted(range(c["n_group"]), key=lambda g: (-groups[g], g))[: c["topk_group"]]
        masked = [score if i // size in kept else self.mask for i, score in enumerate(biased)]
        return sorted(range(len(masked)), key=lambda i: (-masked[i], i))[: c["num_experts_per_tok"]]

    def swiglu(self, x: Tensor, at: str) -> Tensor:
        gate, up = x @ self[at + "gate_proj.weight"].T, x @ self[at + "up_proj.weight"].T
        return (F.silu(gate) * up) @ self[at + "down_proj.weight"].T

    def norm(self, x: Tensor, at: str) -> Tensor:
        # The released code builds the two norms of the latents without the configured epsilon.
        epsilon = 1e-6 if at.endswith("_a_layernorm") else self.config["rms_norm_eps"]
        scaled = x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
        return scaled * self[at + ".weight"]

    def yarn(self) -> dict[str, Any] | None:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return rope if "yarn" in (rope.get("type"), rope.get("rope_type")) else None

    def theta(self) -> float:
        return (self.config.get("rope_parameters") or self.config)["rope_theta"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].float()
