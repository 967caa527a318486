"""Training metrics of DeepSeek-V3, on Megatron's log interval: console, TensorBoard, `metrics.jsonl`.

    metrics.install()   # before training; the trainer does it
    metrics.latest()    # the last logged step's figures, on every rank

docs/metrics.md lists them.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["add_figures", "install", "latest"]

# `flops` is for pure code too: torch is imported only by those who train.


def install() -> None:
    """See `hooks.install`."""
    from dsv3_megatron.metrics import hooks

    hooks.install()


def add_figures(function: Callable[[dict[str, Any]], dict[str, float]]) -> None:
    """See `hooks.add_figures`."""
    from dsv3_megatron.metrics import hooks

    hooks.add_figures(function)


def latest() -> dict[str, Any]:
    """See `hooks.latest`."""
    from dsv3_megatron.metrics import hooks

    return hooks.latest()
