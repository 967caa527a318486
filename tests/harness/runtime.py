"""Which runtime the tests use: the CPU stand-ins, unless the GPU tests ask for real devices."""

import os
import sys


def on_gpu() -> bool:
    """True when `make test-gpu` runs the tests (it sets DSV3_TEST_DEVICE=gpu)."""
    return os.environ.get("DSV3_TEST_DEVICE") == "gpu"


def activate_runtime() -> None:
    """Make Megatron importable here; with DSV3_TEST_TE=1 (`make test-te`) Transformer Engine too."""
    if on_gpu():
        return
    from dsv3_megatron import cpu

    if os.environ.get("DSV3_TEST_TE") == "1":
        cpu.activate(allow_te=True)
    else:
        cpu.activate()


def forget_the_trainer() -> None:
    """Empty the globals that Megatron's trainer sets once per process: its arguments, the counter of microbatches, …

    A start that is refused after its arguments were validated leaves them set, and the next start in the same process
    would be refused for that alone.
    """
    trainer = sys.modules.get("megatron.training.global_vars")
    if trainer is None or trainer._GLOBAL_ARGS is None:
        return
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    trainer.destroy_global_vars()
    destroy_num_microbatches_calculator()
