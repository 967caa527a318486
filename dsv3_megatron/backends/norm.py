"""RMSNorm in plain PyTorch, usable under sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

__all__ = ["RMSNorm"]


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in at least fp32.

    Megatron's own PyTorch norm refuses sequence parallelism. Here the weight is marked `sequence_parallel`,
    so that `finalize_model_grads` sums its gradient over the tensor-parallel ranks, each of which saw a part
    of the sequence.

    Args:
        config: read for params_dtype and sequence_parallel.
        hidden_size: size of the normalised dimension.
        eps: added to the mean square; DeepSeek-V3 uses 1e-6 (`--norm-epsilon 1e-6`).

    Raises:
        ValueError: the config asks for LayerNorm or for zero-centered weights.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"--normalization {config.normalization}: DeepSeek-V3 needs --normalization RMSNorm"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "--apply-layernorm-1p: the norms of DeepSeek-V3 are not zero-centered; leave it out"
            )
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size], any float dtype; returns the same shape and dtype."""
        if torch.is_inference_mode_enabled():  # the same to the last bit, in one call
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(compute_dtype)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
