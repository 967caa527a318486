"""Device stand-ins inside Megatron itself, installed when the module that holds them is imported."""

import functools
import logging
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
