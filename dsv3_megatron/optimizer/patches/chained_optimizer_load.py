"""`ChainedOptimizer.load_state_dict`: optimizer state loads under another layout, and under another learning rate.

With expert parallelism Megatron chains two optimizers, of dense and of expert parameters; without it there is one. The
tensors of a fully reshardable checkpoint are stored by parameter and fit either way; what is not a tensor (parameter
groups with their step) is stored per optimizer, and Megatron refuses another number of them.

Megatron finds the saved group of a parameter group by its constants, peak and final learning rate among them. Where
these changed, as `--override-opt-param-scheduler` and `--use-checkpoint-opt-param-scheduler` allow, it finds none.
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


# Constants that the schedule gives a group; what else tells groups apart is what they are.
_OF_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")
_OF_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "optimizer")


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in _OF_GROUP)


def _groups(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The parameter groups in one optimizer's state."""
    inner = state.get("optimizer", state)
    return inner.get("param_groups", []) if isinstance(inner, dict) else []


def give_rates(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
    """Let Megatron find the saved groups: they get this run's constants of the schedule, in place.

    Returns:
        The constants that they had, by kind of group.
    """
    now = {_kind(group): {name: group[name] for name in _OF_SCHEDULE if name in group} for group in current}
    had = {}
    for group in saved:
        mine = now.get(_kind(group), {})
        had[_kind(group)] = {name: group.get(name, value) for name, value in mine.items()}
        group.update(mine)
    return had


def _load_other_rates(original: Any, self: Any, state: dict[Any, Any], keep_saved: bool) -> None:
    """Load where the schedule's constants differ; the groups have this run's afterwards, or the saved ones."""
    optimizers = self.chained_optimizers
    parts = [state] if len(optimizers) == 1 else [state[i] for i in range(len(optimizers))]
    had = [
        give_rates(_groups(part), optimizer.param_groups)
        for part, optimizer in zip(parts, optimizers, strict=True)
    ]
    original(self, state)
    if keep_saved:
        for rates, optimizer in zip(had, optimizers, strict=True):
            for group in optimizer.param_groups:
                group.update(rates.get(_kind(group), {}))


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        from megatron.training import global_vars

        if isinstance(state_dict, dict):
            state_dict = regrouped(state_dict, len(self.chained_optimizers))
            args = global_vars._GLOBAL_ARGS  # None where an optimizer is loaded outside of a trainer
            if args is not None and (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
                keep = args.use_checkpoint_opt_param_scheduler
                _load_other_rates(original, self, state_dict, keep_saved=keep)
                return
        original(self, state_dict)

    return load_state_dict


PATCH = Patch(
    name="chained_optimizer_load",
    target="megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict",
    signature="(self, state_dict)",
    why="optimizer checkpoints for any layout: EP 1 and EP > 1 load each other's; and for another learning rate, where "
    "--override-opt-param-scheduler or --use-checkpoint-opt-param-scheduler allows it",
    install=_install,
)
