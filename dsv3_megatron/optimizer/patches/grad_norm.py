"""`clip_grads.get_grad_norm_fp32`: the clipping norm has the same bits wherever gradients lie.

Megatron sums rank by rank, tensor by tensor, in fp32. So the last bit of the norm, and through clipping of all weights,
depends on the layout: on which rank an expert is (--expert-placement), in which communicator the mirrored copies of
DualPipe add up. With an exact sum it does not.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_grad_norm_fp32(
        grads_for_norm: Any, norm_type: int | float = 2, grad_stats_parallel_group: Any = None
    ) -> Any:
        import torch
        from megatron.core.optimizer import clip_grads
        from torch import distributed as dist

        from dsv3_megatron.optimizer.grad_norm import exact_norm

        grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else list(grads_for_norm)
        if norm_type != 2 or any(not _plain(grad) for grad in grads):
            return original(grads_for_norm, norm_type, grad_stats_parallel_group)
        norm = exact_norm(
            grads,
            lambda x: dist.all_reduce(x, dist.ReduceOp.MAX, group=grad_stats_parallel_group),
            lambda x: dist.all_reduce(x, dist.ReduceOp.SUM, group=grad_stats_parallel_group),
            dist.get_world_size(grad_stats_parallel_group),
            torch.device("cuda", torch.cuda.current_device()),
        ).float()
        # Transformer Engine's clipping takes a tensor, Megatron's own a number.
        return norm.view(1) if clip_grads.multi_tensor_scale_tensor_impl is not None else norm.item()

    return get_grad_norm_fp32


def _plain(grad: Any) -> bool:
    """A tensor of this rank (not one that Megatron FSDP has sharded), in fp32 or less."""
    return not hasattr(grad, "_local_tensor") and grad.dtype.itemsize <= 4


PATCH = Patch(
    name="grad_norm",
    target="megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
    signature="(grads_for_norm, norm_type=2, grad_stats_parallel_group=None)",
    why="the clipping norm has the same bits in any placement of experts, and on both mirrored ranks",
    install=_install,
    also=("megatron.core.optimizer.optimizer:get_grad_norm_fp32",),
)
