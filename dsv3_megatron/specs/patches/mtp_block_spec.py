"""`megatron.training.models.gpt.mtp_block_spec`: the MTP block follows our decoder spec.

Megatron's GPT builder takes the decoder from `--spec` but derives the MTP block from its own specs. An
unpatched `pretrain_gpt.py --spec dsv3_megatron.specs dsv3` would so train an MTP layer of other modules
than the decoder's.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _uses_dsv3(spec: Any) -> bool:
    """Whether the model config's layer spec is a function of `dsv3_megatron.specs`."""
    return callable(spec) and getattr(spec, "__module__", "").split(".")[:2] == ["dsv3_megatron", "specs"]


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def mtp_block_spec(config: Any, transformer_layer_spec: Any, vp_stage: int | None = None) -> Any:
        if not _uses_dsv3(config.transformer_layer_spec):
            return original(config, transformer_layer_spec, vp_stage)
        from dsv3_megatron.specs.block import mtp_spec

        return mtp_spec(config, vp_stage)

    return mtp_block_spec


PATCH = Patch(
    name="mtp_block_spec",
    target="megatron.training.models.gpt:mtp_block_spec",
    signature="(config, transformer_layer_spec, vp_stage=None)",
    why="the MTP block of an unpatched pretrain_gpt.py is built from our spec, as the decoder is",
    install=_install,
)
