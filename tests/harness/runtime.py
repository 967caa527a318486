"""Which runtime the tests use: the CPU stand-ins, unless the GPU tests ask for real devices."""

import os


def on_gpu() -> bool:
    """True when `make test-gpu` runs the tests (it sets DSV3_TEST_DEVICE=gpu)."""
    return os.environ.get("DSV3_TEST_DEVICE") == "gpu"


def activate_runtime() -> None:
    """Make Megatron importable here; with DSV3_TEST_TE=1 (`make test-te`) Transformer Engine too."""
    if on_gpu():
        return
    import importlib.util

    if importlib.util.find_spec("dsv3_megatron.cpu") is None:  # TEMPORARY until dsv3_megatron.cpu lands
        return
    from dsv3_megatron import cpu

    if os.environ.get("DSV3_TEST_TE") == "1":
        cpu.activate(allow_te=True)
    else:
        cpu.activate()
