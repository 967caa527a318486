"""The schedules as Megatron's own objects give them: at every border, and after a resume inside every phase."""

import argparse
import copy
from types import SimpleNamespace

import pytest
import torch
from megatron.core import num_microbatches_calculator as batches
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dsv3_megatron.arguments import complete, megatron_parser
from dsv3_megatron.arguments.command_line import parse
from dsv3_megatron.patching import install, unload
from dsv3_megatron.recipe.arguments import apply, schedules_of
from dsv3_megatron.recipe.install import set_constants
from dsv3_megatron.recipe.schedules import Schedules
from tests.recipe.test_schedules import GOLDEN

SEQ = 4096
WORDS = "--spec dsv3 --mock-data --transformer-impl local --train-tokens 14.8e12 --batch-ramp 3072 768 --eval-iters 0"
# One point inside each phase: warm-up and first batch, ramp, constant, cosine, first and second tail.
INSIDE = [10 * 10**9, 200 * 10**9, 5 * 10**12, 12 * 10**12, 14_400 * 10**9, 14_700 * 10**9]


@pytest.fixture(scope="module")
def args() -> argparse.Namespace:
    """The completed arguments of the published run, with what Megatron's validation would add."""
    parsed = parse(megatron_parser(), complete(WORDS.split()))
    assert parsed.global_batch_size == 15360 and parsed.train_iters is None
    apply(parsed)
    parsed.start_weight_decay = parsed.end_weight_decay = parsed.weight_decay
    return parsed


def published(args: argparse.Namespace) -> Schedules:
    schedules = schedules_of(args)
    assert schedules is not None
    return schedules


def new_scheduler(args: argparse.Namespace, monkeypatch) -> OptimizerParamScheduler:
    """Built by Megatron's own function, through the patch."""
    from megatron.training import training

    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "max_lr": args.lr, "min_lr": args.min_lr}])
    args = copy.copy(args)
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    monkeypatch.setattr(training, "update_train_iters", lambda args: None)  # 235,240 steps of nothing
    install(["get_optimizer_param_scheduler"])
    try:
        return training.get_optimizer_param_scheduler(optimizer)
    finally:
        unload("get_optimizer_param_scheduler")


@pytest.fixture
def calculator(args):
    """Megatron's number of microbatches on the published 128 data-parallel ranks."""
    batches.destroy_num_microbatches_calculator()
    batches.init_num_microbatches_calculator(
        rank=1,
        global_batch_size=args.global_batch_size,
        micro_batch_size=1,
        data_parallel_size=128,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    yield batches
    batches.destroy_num_microbatches_calculator()


def test_borders(args, calculator, monkeypatch) -> None:
    scheduler = new_scheduler(args, monkeypatch)
    assert isinstance(scheduler, OptimizerParamScheduler)
    config = SimpleNamespace(moe_router_bias_update_rate=None, mtp_loss_scaling_factor=None)
    model = [torch.nn.Linear(1, 1)]
    model[0].config = config
    for tokens, (lr, batch, gamma, mtp_weight) in GOLDEN.items():
        samples = tokens // SEQ
        scheduler.step(samples - scheduler.num_steps)
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-8), tokens
        calculator.update_num_microbatches(samples, consistency_check=True)
        assert calculator.get_current_global_batch_size() == batch
        assert calculator.get_num_microbatches() == batch // 128
        set_constants(model, published(args), samples)
        assert (config.moe_router_bias_update_rate, config.mtp_loss_scaling_factor) == (gamma, mtp_weight)


@pytest.mark.parametrize("tokens", INSIDE)
def test_resume_inside_each_phase(tokens: int, args, calculator, monkeypatch) -> None:
    """A scheduler that loads another's state goes on exactly as that one; so do the batches."""
    straight, resumed = new_scheduler(args, monkeypatch), new_scheduler(args, monkeypatch)
    schedules = published(args)
    straight.step(tokens // SEQ)
    resumed.load_state_dict(straight.state_dict())
    for later in (0, 1, 15360, 10**9 // SEQ, 100 * 10**9 // SEQ):
        samples = tokens // SEQ + later
        for scheduler in (straight, resumed):
            scheduler.step(samples - scheduler.num_steps)
        lr = resumed.optimizer.param_groups[0]["lr"]
        assert (
            lr
            == straight.optimizer.param_groups[0]["lr"]
            == pytest.approx(schedules.lr_at(samples), rel=1e-12)
        )
        calculator.update_num_microbatches(samples, consistency_check=True)
        assert calculator.get_current_global_batch_size() == schedules.ramp.batch_size(samples)


def test_a_checkpoint_of_another_schedule_is_refused(args, monkeypatch) -> None:
    scheduler = new_scheduler(args, monkeypatch)
    for name, value in (("last_lr", 1e-6), ("lr_decay_steps", 5), ("last_phase", 7)):
        with pytest.raises(AssertionError, match="do not match"):
            new_scheduler(args, monkeypatch).load_state_dict({**scheduler.state_dict(), name: value})


def test_steps_of_the_run_are_megatrons(args, calculator, monkeypatch) -> None:
    """Megatron counts the steps of a sample-based run one by one."""
    from megatron.training import training

    counted = copy.copy(args)
    counted.train_iters = None
    training.update_train_iters(counted)
    ramp = published(args).ramp
    assert (
        ramp.samples_after(counted.train_iters - 1)
        < args.train_samples
        <= ramp.samples_after(counted.train_iters)
    )
