"""`--spec dsv3`: DeepSeek-V3's layers as Megatron specs (MLA, MoE, MTP) over two backends.

`dsv3` is the decoder's spec function, `mtp_spec` that of multi-token prediction. This is the door by which a Megatron
that knows nothing of us comes in (`--spec dsv3_megatron.specs dsv3`): whoever takes one of the two from here has its
command line checked. Until then nothing is imported.
"""

from typing import Any

__all__ = ["dsv3", "mtp_spec"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsv3_megatron.arguments.unpatched import when_specs_are_imported
    from dsv3_megatron.specs.block import dsv3, mtp_spec

    when_specs_are_imported()
    globals().update(dsv3=dsv3, mtp_spec=mtp_spec)  # Megatron looks into the module's dict
    return globals()[name]
