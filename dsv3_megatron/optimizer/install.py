"""Choose the AdamW implementation and make Megatron use it."""

from typing import Literal

from dsv3_megatron import cpu, patching

__all__ = ["implementation", "install"]

Implementation = Literal["transformer_engine", "apex", "dsv3_megatron"]


def implementation() -> Implementation:
    """Whose AdamW runs: on a GPU the fused one of TE or Apex (fp32 moments only) if present, else ours."""
    from megatron.core.optimizer import Adam  # what Megatron could import, or ours after install()

    package = Adam.__module__.partition(".")[0]
    if cpu.is_active() or package == "torch":
        return "dsv3_megatron"
    return package


def install() -> Implementation:
    """Make Megatron's `--optimizer adam` use the implementation of this machine, and its checkpoints fit any layout.

    Idempotent; to be called after Megatron can be imported and before its optimizer config is built.

    Returns:
        The implementation in use.

    Raises:
        dsv3_megatron.patching.PatchMismatch: this Megatron version differs from the patches' expectation.
    """
    chosen = implementation()
    patching.install(
        ["precision_aware_optimizer", "fully_reshardable_offsets", "chained_optimizer_load", "grad_norm"]
    )
    if chosen == "dsv3_megatron":
        patching.install(["adamw"])
    return chosen
