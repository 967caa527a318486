"""`ColumnParallelLinear.__init__`: gradient accumulation fusion without Apex.

Megatron's own Linear refuses `--gradient-accumulation-fusion`, which is on by default, unless Apex's extension is
installed; so no model is built without Apex, the output head being such a Linear in both backends. Turning the option off
would make Transformer Engine's weight gradients bf16. In place of the extension Megatron is given
`dsv3_megatron.backends.wgrad`; an installed one stays. The replaced constructor only checks that this still stands.
"""

import functools
import sys
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    from megatron.core.tensor_parallel import layers

    from dsv3_megatron.backends import wgrad

    if not layers._grad_accum_fusion_available:
        # Megatron imports it by name where it drains the embedding's deferred weight gradients.
        layers.fused_weight_gradient_mlp_cuda = sys.modules.setdefault(wgrad.NAME, wgrad.extension())
        layers._grad_accum_fusion_available = True

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not layers._grad_accum_fusion_available:
            raise RuntimeError(
                "megatron.core.tensor_parallel.layers was changed after the patch fused_wgrad was installed"
            )
        original(self, *args, **kwargs)

    return __init__


PATCH = Patch(
    name="fused_wgrad",
    target="megatron.core.tensor_parallel.layers:ColumnParallelLinear.__init__",
    signature=(
        "(self, input_size, output_size, *, config, init_method, bias=True, gather_output=False, stride=1, "
        "keep_master_weight_for_test=False, skip_bias_add=False, skip_weight_param_allocation=False, "
        "embedding_activation_buffer=None, grad_output_buffer=None, is_expert=False, tp_comm_buffer_name=None, "
        "disable_grad_reduce=False, tp_group=None, name=None)"
    ),
    why="no model is built without Apex: Megatron's Linears want its kernel for fp32 weight gradients",
    install=_install,
)
