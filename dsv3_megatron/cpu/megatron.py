"""Device stand-ins inside Megatron itself, installed when the module that holds them is imported."""

import functools
import logging
import queue
import sys
from collections.abc import Callable
from typing import Any

import torch


def quiet_rng_tracker(original: type) -> type:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    return original


def maybe_move_tensor_to_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    return move


def results_queue(original: Callable) -> Callable:
    """A queue of this process for checkpoints that are written in it; for others Megatron's, with its own process."""
    results: queue.Queue = queue.Queue()

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        trainer = sys.modules.get("megatron.training.global_vars")
        args = trainer and trainer._GLOBAL_ARGS
        in_this_process = args is not None and not args.async_save
        return results if in_this_process else original(mp_mode)

    return get_write_results_queue
