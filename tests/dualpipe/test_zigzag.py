"""Zigzag in Megatron: every gradient against one process, with one V and with two, and with uneven stages."""

import dataclasses
import functools
from typing import Any

import pytest

from tests.dualpipe.common import FP64, ScheduledLayout, ScheduledProblem, reference, run_step
from tests.dualpipe.test_parallel import VALID
from tests.parallel.common import assert_same_step

OVERLAP = (("overlap_grad_reduce", True), ("use_distributed_optimizer", False))
# By pipeline ranks and chunks: layers of each stage, none alike.
UNEVEN = {
    (2, 2): (1, 2, 0, 1),
    (2, 4): (1, 0, 2, 1, 1, 0, 2, 1),
    (3, 2): (1, 0, 2, 1, 0, 1),
    (4, 2): (1, 2, 1, 0, 1, 1, 2, 0),
    (4, 4): (1, 0, 1, 1, 0, 2, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0),
}


@functools.cache
def whole(problem: ScheduledProblem):
    return reference(problem)


def check(pp: int, chunks: int, ep: int = 1, tolerance: float = 1e-5, table: tuple = (), **given) -> None:
    """A step at these sizes; the stages hold different numbers of layers."""
    sizes = {name: given.pop(name) for name in ("tp", "cp") if name in given}
    layers = UNEVEN[pp, chunks]
    fields: dict[str, Any] = {"num_layers": sum(layers), "num_sequences": 16, "layers": layers} | given
    problem = ScheduledProblem(**fields)
    width = ep * sizes.get("tp", 1) * sizes.get("cp", 1)
    layout = ScheduledLayout(
        world_size=pp * width, pp=pp, ep=ep, schedule="zigzag", chunks=chunks, table=table, **sizes
    )
    bare = dataclasses.replace(problem, ddp=(), layers=())
    assert_same_step(run_step(layout, problem), whole(bare), tolerance)


@pytest.mark.parametrize(
    "pp, chunks, ep",
    [(2, 2, 2), (2, 4, 1)]
    + [
        pytest.param(*sizes, marks=pytest.mark.slow)
        for sizes in ((2, 2, 1), (2, 4, 2), (3, 2, 1), (3, 2, 2), (4, 2, 1), (4, 2, 2), (4, 4, 1), (4, 4, 2))
    ],
)
def test_fp32(pp: int, chunks: int, ep: int) -> None:
    """With the gradient reduction overlapped, and with expert parallelism where pairs overlap."""
    check(pp, chunks, ep, ddp=OVERLAP)


@pytest.mark.slow
@pytest.mark.parametrize("pp, chunks, ep", [(2, 2, 2), (2, 4, 2), (4, 2, 1), (4, 4, 1)])
def test_fp64(pp: int, chunks: int, ep: int) -> None:
    check(pp, chunks, ep, tolerance=1e-10, dtype=FP64)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}, {"ep": 2, "tp": 2}], ids=str)
def test_tensor_and_context_parallel(sizes: dict, chunks: int) -> None:
    check(2, chunks, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("sequences", [1, 3, 5])
def test_few_and_odd_numbers_of_microbatches(sequences: int, chunks: int) -> None:
    """DualPipeV needs two microbatches for each pipeline rank; a zigzag takes any number."""
    check(2, chunks, num_sequences=sequences)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("per_token_loss", [False, True])
def test_padding_and_uneven_valid_tokens(per_token_loss: bool, chunks: int) -> None:
    padded = tuple(16 - valid if valid > 8 else 0 for valid in VALID)
    check(2, chunks, ep=2, valid_tokens=VALID, padded_tokens=padded, per_token_loss=per_token_loss)


@pytest.mark.slow
def test_under_a_tight_cap_and_with_weight_gradients_that_wait_long() -> None:
    for cap, deferred in ((5.0, 1.8), (40.0, 0.0)):
        check(2, 2, ep=2, table=(("memory_cap", cap), ("deferred", deferred)))


@pytest.mark.parametrize("schedule", ["zigzag", "dualpipev"])
def test_a_stage_without_layers_has_its_gradient_where_pairs_overlap(schedule: str) -> None:
    """The plan of such a chunk gives back its input: what is sent on must not be freed as an output."""
    problem = ScheduledProblem(num_layers=2, num_sequences=8, layers=(1, 0, 1, 0))
    layout = ScheduledLayout(world_size=4, pp=2, ep=2, schedule=schedule)
    assert_same_step(run_step(layout, problem), whole(dataclasses.replace(problem, layers=())), 1e-5)
