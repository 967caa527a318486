"""`ChainedOptimizer.load_state_dict`: optimizer state saved with expert parallelism loads without, and the reverse.

With expert parallelism Megatron chains two optimizers, of dense and of expert parameters; without it there is one. The
tensors of a fully reshardable checkpoint are stored by parameter and fit either way; what is not a tensor (parameter
groups with their step) is stored per optimizer, and Megatron refuses another number of them.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def regrouped(state: dict[Any, Any], num_optimizers: int) -> dict[Any, Any]:
    """The state of `num_optimizers` optimizers, from what was saved by one or by two.

    Args:
        state: as loaded: a dict per optimizer under 0, 1, …, or a single one's entries; with the tensors where this
            run asked for them, and everything else where it was saved.
    """
    saved_as_one, saved_as_chain = "optimizer" in state, "optimizer" in state.get(0, {})
    if num_optimizers == 1 and saved_as_chain:
        chain = [state[i] for i in sorted(key for key in state if isinstance(key, int))]
        own = {key: value for key, value in state.items() if not isinstance(key, int)}
        return {**chain[0], **own}
    if num_optimizers > 1 and saved_as_one:
        common = {key: value for key, value in state.items() if not isinstance(key, int)}
        groups = common["optimizer"]["param_groups"]
        common["optimizer"] = {
            **common["optimizer"],
            "param_groups": [
                {**group, "is_expert_parallel": expert} for expert in (False, True) for group in groups
            ],
        }
        return {i: {**common, **state[i]} for i in range(num_optimizers)}
    return state


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        if isinstance(state_dict, dict):
            state_dict = regrouped(state_dict, len(self.chained_optimizers))
        original(self, state_dict)

    return load_state_dict


PATCH = Patch(
    name="chained_optimizer_load",
    target="megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict",
    signature="(self, state_dict)",
    why="optimizer checkpoints for any layout: EP 1 and EP > 1 load each other's",
    install=_install,
)
