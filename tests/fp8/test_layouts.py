"""An FP8 step in every layout and schedule against the same FP8 step in one process.

What can be exactly equal is: the loss, and all gradients that do not pass a 128×1 tile over tokens which another layout
fills with other tokens. A weight gradient's tiles hold the tokens that reach a layer together in one microbatch on one
rank, so experts' weight gradients differ with expert parallelism by the error of quantising them, which is bounded.
"""

import functools
from typing import Any

import pytest
import torch

from tests.dualpipe.common import ScheduledLayout, ScheduledProblem
from tests.dualpipe.common import run_step as run_scheduled
from tests.harness import run_distributed
from tests.parallel.common import Layout, Problem, StepResult, relative_difference, run_step

FP8 = (("fp8_recipe", "dsv3"),)
EXACT, TILES = 1e-5, 0.06
PROBLEM = Problem(overrides=FP8)
SCHEDULED = ScheduledProblem(num_sequences=16, overrides=FP8)
OVERLAP = (("overlap_grad_reduce", True), ("use_distributed_optimizer", False))


@functools.cache
def whole(problem: Problem) -> StepResult:
    return run_step(Layout(), problem)


def differences(split: StepResult, one: StepResult) -> dict[str, float]:
    assert split.grads.keys() == one.grads.keys()
    return {name: relative_difference(split.grads[name], one.grads[name]) for name in one.grads}


def assert_same(split: StepResult, one: StepResult, tiled: tuple[str, ...] = ()) -> None:
    """Equal but for the names that contain one of `tiled`, which are near; each kind is there."""
    assert split.lm_loss == pytest.approx(one.lm_loss, rel=1e-6)
    far = {
        name: difference
        for name, difference in differences(split, one).items()
        if difference > (TILES if any(part in name for part in tiled) else EXACT)
    }
    assert not far


def test_fp8_is_on() -> None:
    """The steps compared here are FP8's: another loss, and gradients that are near those in fp32."""
    plain = whole(Problem())
    one = whole(PROBLEM)
    assert one.lm_loss != plain.lm_loss and one.lm_loss == pytest.approx(plain.lm_loss, rel=5e-3)
    for name, difference in differences(one, plain).items():
        # Some tokens go to other experts, whose gradients are of other tokens then.
        assert 1e-3 < difference < (2 if ".experts." in name or "router" in name else 0.6), (name, difference)


def test_expert_parallel() -> None:
    """Forward through FP8 dispatch is bit for bit the same as without dispatch."""
    split = run_step(Layout(world_size=2, ep=2), PROBLEM)
    assert_same(split, whole(PROBLEM), (".experts.",))
    assert split.lm_loss == whole(PROBLEM).lm_loss


@pytest.mark.parametrize(
    "schedule",
    ["dualpipe", "zb1p", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dualpipev", "zigzag"))],
)
def test_schedule(schedule: str) -> None:
    layout = ScheduledLayout(world_size=2, pp=2, schedule=schedule)
    one = ScheduledProblem(num_sequences=16, overrides=FP8)
    split = run_scheduled(layout, ScheduledProblem(num_sequences=16, overrides=FP8, ddp=OVERLAP))
    assert_same(split, whole(_bare(one)))


def test_dualpipe_with_experts() -> None:
    """Equal to expert parallelism alone, whose experts get the same tokens together; near one process.

    On some processors the last bit of a product depends on its number of rows, and one FP8 value that is rounded the
    other way for it moves every gradient below. So one process, whose experts get other batches, is no exact measure.
    """
    layout = ScheduledLayout(world_size=4, pp=2, ep=2, schedule="dualpipe")
    split, problem = run_scheduled(layout, SCHEDULED), _bare(SCHEDULED)
    assert_same(split, run_step(Layout(world_size=2, ep=2), problem))
    assert_same(split, whole(problem), ("",))


def _bare(problem: ScheduledProblem) -> Problem:
    return Problem(num_sequences=problem.num_sequences, overrides=problem.overrides)


def layer_under_tensor_parallelism(
    rank: int, world_size: int, kind: str, delay: bool
) -> tuple[torch.Tensor, ...]:
    """Whole output, input gradient and weight gradient of one FP8 layer under TP + sequence parallel."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from tests.fp8.test_linear import KINDS, config, normal

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    size = 256  # each rank's part is a whole number of blocks
    fields = {"tensor_model_parallel_size": world_size, "sequence_parallel": world_size > 1}
    options = {"config": config(delay=delay, **fields), "init_method": torch.nn.init.zeros_, "bias": False}
    row = kind in ("row", "attention", "down")
    layer: Any = KINDS[kind](
        size, size, skip_bias_add=False, **options, **({"input_is_parallel": True} if row else {})
    )

    def part(full: torch.Tensor, dim: int) -> torch.Tensor:
        return full.chunk(world_size, dim)[rank]

    layer.weight.data = part(normal(size, size, seed=1), 1 if row else 0)
    halves = [
        normal(8, 2, size, seed=seed) for seed in (2, 3)
    ]  # row: features are split, in both halves of u
    x = torch.cat([part(half, 2 if row else 0) for half in halves[: 2 if kind == "down" else 1]], -1)
    x = x.clone().requires_grad_()
    y = layer((x, None) if kind == "down" else x)[0]
    y.backward(part(normal(8, 2, size, seed=4), 0 if row else 2))
    layer.backward_dw()

    def join(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    dx = [join(half, 2 if row else 0) for half in (x.grad.chunk(2, 2) if kind == "down" else [x.grad])]
    return join(y.detach(), 0 if row else 2), torch.cat(dx, -1), join(layer.weight.grad, 1 if row else 0)


@pytest.mark.parametrize("kind", ["column", "row", "attention", "down"])
def test_tensor_parallel_layer(kind: str) -> None:
    """Blocks and tiles are the same where a part is a multiple of 128, so only sums over ranks round differently.

    A whole model cannot be compared like this: the last bit of a sum decides now and then which code is taken.
    """
    one = run_distributed(layer_under_tensor_parallelism, world_size=1, kind=kind, delay=False)[0]
    two = run_distributed(layer_under_tensor_parallelism, world_size=2, kind=kind, delay=kind != "row")[0]
    for expected, got in zip(one, two, strict=True):
        assert relative_difference(got, expected) <= 1e-6
