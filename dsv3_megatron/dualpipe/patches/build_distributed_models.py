"""`GPTModelBuilder.build_distributed_models`: chunks of a rank in a V, and modules that delay weight gradients.

Megatron builds a single chunk where its pipeline group has one rank, which DualPipe on two ranks is to it, and accepts
`delay_wgrad_compute` with its own overlapped schedule only. Our builder inherits this; an unmodified `pretrain_gpt.py`
uses Megatron's.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def build_distributed_models(
        self: Any, pg_collection: Any, ddp_config: Any = None, **options: Any
    ) -> Any:
        from dsv3_megatron import dualpipe

        if dualpipe.delays_weight_gradients():
            # The modules ask the configuration, DDP its own.
            self._model_config.transformer.delay_wgrad_compute = True
            if ddp_config is not None:
                ddp_config.delay_wgrad_compute = True
        placement = dualpipe.placement()
        if placement is None:
            return original(self, pg_collection, ddp_config, **options)
        from dsv3_megatron.dualpipe.model_chunks import build_chunks

        return build_chunks(self, pg_collection, placement.chunks, ddp_config=ddp_config, **options)

    return build_distributed_models


PATCH = Patch(
    name="build_distributed_models",
    target="megatron.training.models.gpt:GPTModelBuilder.build_distributed_models",
    signature=(
        "(self, pg_collection, ddp_config=None, overlap_param_gather_with_optimizer_step=False, "
        "use_megatron_fsdp=False, use_torch_fsdp2=False, wrap_with_ddp=True, data_parallel_random_init=True, "
        "mixed_precision_wrapper=<class 'megatron.core.transformer.module.Float16Module'>, "
        "model_type=<ModelType.encoder_or_decoder: 1>)"
    ),
    why="--pipeline-schedule: the chunks of a rank in a V, weight gradients apart from the backward pass",
    install=_install,
)
