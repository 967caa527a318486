"""What Megatron has broken or left out: patches that every run needs, whatever the device.

A trainer installs them before it builds anything; the CPU runtime, under which unmodified Megatron runs too, installs
each as its module is imported. None of them stands for a device: those stand-ins are `dsv3_megatron.cpu`'s.
"""

from dsv3_megatron import patching

REPAIRS = (
    "compile_helpers",
    "fused_wgrad",
    "torch_norm",
    "optimizer_state_before_first_step",
    "own_steps_after_load",
    "step_with_the_groups",
    "preload_tensors",
    "field_docstrings",
)


def install() -> None:
    """Install all of them. Idempotent.

    Raises:
        PatchMismatch: this Megatron version differs from what a patch was written for.
    """
    patching.install(REPAIRS)


def targets() -> dict[str, tuple[str, str]]:
    """Megatron's module and the symbol in it, by name of the patch; nothing of Megatron is imported."""
    found = {name: patching.load(name).target.partition(":") for name in REPAIRS}
    return {name: (module, symbol) for name, (module, _, symbol) in found.items()}
