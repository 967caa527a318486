"""What is served: a model on a layout for serving, in one phase. Pure."""

from dataclasses import dataclass
from typing import Literal

from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.specs.deployment import Deployment

__all__ = ["BYTES", "Phase", "ServingJob"]

Phase = Literal["prefill", "decode"]
BYTES = {"bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class ServingJob:
    """One deployment unit and its load.

    Attributes:
        sizes: of the model.
        gpu: of which there are `num_gpus`, all in one expert-parallel group.
        tp: tensor-parallel size of attention; dense MLPs and shared experts are whole (TP1).
        phase: a forward pass is whole prompts, or a token (or two, with drafts) of every request.
        deployment: copies of experts, the shared one among them, overlapped microbatches.
        context: tokens in the cache of a request, on average; in prefill the length of a prompt.
        batch: requests per GPU; with TP a replica of `tp` GPUs has `tp` times as many.
        weights, cache: "fp8" or "bf16", bytes of an element; products run in the weights' precision.
        imbalance: tokens of the fullest GPU's experts over the mean.
        acceptance: of drafts by the MTP layer; None without them.
        absorbed_prefill: attention of prompts in the space of the latents (this engine), or expanded (DeepSeek's).
        cached: share of a prompt that earlier requests left in the cache.
    """

    sizes: ModelSizes
    gpu: Gpu
    num_gpus: int
    tp: int
    phase: Phase
    deployment: Deployment
    context: int
    batch: float
    weights: str = "bf16"
    cache: str = "bf16"
    imbalance: float = 1.0
    acceptance: float | None = None
    absorbed_prefill: bool = True
    cached: float = 0.0

    @property
    def num_slots(self) -> int:
        """Experts of a layer on all GPUs, copies counted."""
        return self.deployment.num_slots(self.sizes.num_moe_experts) if self.sizes.num_moe_experts else 0

    @property
    def slots_per_gpu(self) -> float:
        return self.num_slots / self.num_gpus

    @property
    def topk(self) -> int:
        """Experts that a token is sent to."""
        return self.sizes.moe_router_topk + int(self.deployment.shared_as_routed)

    @property
    def queries(self) -> float:
        """Tokens of a request in a pass."""
        if self.phase == "prefill":
            return self.context * (1 - self.cached)
        return 1 if self.acceptance is None else 2

    @property
    def tokens(self) -> float:
        """Tokens of a GPU in a pass: its share of its replica's."""
        return self.batch * self.queries

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass brings a request: of its prompt (those found in the cache too), or of its answer."""
        return self.context if self.phase == "prefill" else 1 + (self.acceptance or 0.0)

    @property
    def cache_bytes_per_token(self) -> float:
        """Layers × (kv_lora_rank + rope) × itemsize; the drafting layer has a cache of its own."""
        layers = self.sizes.num_layers + (self.sizes.mtp_num_layers if self.acceptance is not None else 0)
        return layers * (self.sizes.kv_lora_rank + self.sizes.qk_pos_emb_head_dim) * BYTES[self.cache]

    @property
    def num_dense(self) -> int:
        return self.sizes.num_layers - self.sizes.num_moe_layers
