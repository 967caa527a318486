"""Puts post-training into the trainer: data sets, loss, hooks. Without `--posttrain` nothing changes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from dsv3_megatron.posttrain.run import Run

__all__ = ["active", "install"]

_run: Run | None = None


def install() -> None:
    """Follow `--posttrain` in this process. Idempotent."""
    from dsv3_megatron.training import hooks
    from dsv3_megatron.training.datasets import add_source
    from dsv3_megatron.training.step import add_loss

    add_source(_wanted, _build)
    add_loss(_wanted, _loss)
    hooks.after_load(_after_load)
    hooks.before_step(_before_step)
    hooks.before_update(_before_update)
    hooks.after_step(_after_step)
    hooks.around_forward(_around_forward)


def active() -> Run | None:
    """The run of this process, None before the checkpoint is loaded or without `--posttrain`."""
    return _run


def _wanted(args: Any) -> bool:
    return getattr(args, "posttrain", None) is not None


def _make(args: Any) -> Run:
    if args.posttrain == "dpo":
        from dsv3_megatron.posttrain.preference_training import PreferenceTraining

        return PreferenceTraining(args)
    from dsv3_megatron.posttrain.policy_training import PolicyTraining

    return PolicyTraining(args)


def _after_load(call: dict[str, Any], iteration: int) -> None:
    global _run
    from megatron.training import get_args

    if not _wanted(get_args()):
        return
    if _run is None:
        _run = _make(get_args())
    _run.after_load(call, iteration)


def _before_step(call: dict[str, Any]) -> None:
    if _run is not None:
        _run.begin_step(call)


def _before_update(call: dict[str, Any]) -> None:
    if _run is not None:
        _run.before_update(call)


def _around_forward(model: Any, batch: dict[str, Any]) -> Any:
    return nullcontext() if _run is None else _run.replay(model, batch)


def _after_step(call: dict[str, Any], result: Any) -> None:
    if _run is not None:
        _run.after_step(call, result)


def _loss(batch: dict[str, Any], losses: Any) -> Any:
    assert _run is not None, "the checkpoint that the run begins with is loaded before the first step"
    return _run.loss(batch, losses)


def _build(args: Any, num_samples: Sequence[int], built_here: bool) -> Any:
    if args.posttrain == "dpo":
        from dsv3_megatron.posttrain.dataset import train_valid_test_rows

        return train_valid_test_rows(args, num_samples, built_here)
    from dsv3_megatron.posttrain.policy_training import placeholder

    return placeholder(num_samples, built_here)
