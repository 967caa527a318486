"""Stand-ins inside Megatron itself, installed when the module that holds them is imported."""

import copy
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch


def compile_helpers(original: Callable) -> Callable:
    @functools.wraps(original)
    def compile_unless_shipped() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            original()

    return compile_unless_shipped


def quiet_rng_tracker(original: type) -> type:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    return original


def maybe_move_tensor_to_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    return move


def torch_norm(original: type) -> type:
    class WrappedTorchNorm(original):  # type: ignore[misc, valid-type]
        def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
            plain = copy.copy(config)
            plain.sequence_parallel = False
            norm = original.__new__(original, plain, *args, **kwargs)
            for parameter in norm.parameters():
                # Each rank sees its part of the sequence: Megatron sums the gradients of marked parameters.
                parameter.sequence_parallel = config.sequence_parallel
            return norm

    return WrappedTorchNorm


def distributed_optimizer(original: Any) -> Any:
    """With torch.optim.AdamW in place of a fused Adam, `step` is part of each parameter's state."""
    state_dict, load_state_dict = original.state_dict, original.load_state_dict
    set_states = original._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_before_first_step(self: Any) -> dict:
        if self.optimizer.state:
            return state_dict(self)
        # Nothing to take the step from: a new optimizer, or no parameter shard on this rank.
        self.optimizer.state["placeholder"] = {"step": torch.tensor(0.0)}
        try:
            return state_dict(self)
        finally:
            del self.optimizer.state["placeholder"]

    @functools.wraps(load_state_dict)
    def load_state_dict_with_own_steps(self: Any, loaded: dict) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                # Megatron gives all parameters the same tensor; each of them would advance it.
                state["step"] = state["step"].clone()

    @torch.no_grad()  # shards of fp32 parameters are views of leaves, written in place
    @functools.wraps(set_states)
    def set_states_except_step(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
        # The step was loaded with the parameter groups; here it is missing or that of the new optimizer.
        set_states(self, model_param, {**tensors, "step": None})

    original.state_dict = state_dict_before_first_step
    original.load_state_dict = load_state_dict_with_own_steps
    original._set_main_param_and_optimizer_states = set_states_except_step
    return original


def checkpoint_writer(original: Any) -> Any:
    """Copies what the background worker is given: a tensor sent to a process of this machine is shared with it."""
    preload = original.preload_tensors

    @functools.wraps(preload)
    def preload_copies(write_buckets: list, non_blocking: bool = True) -> list:
        return [
            (path, key, (bytes_, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (bytes_, tensors) in preload(write_buckets, non_blocking)
        ]

    original.preload_tensors = staticmethod(preload_copies)
    return original
