"""Overlapped pairs: both orders are equal to the gradient, and communication is hidden behind the other half."""

import dataclasses
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.dualpipe.common import FP64, ScheduledLayout, ScheduledProblem, reference, run_step, train_rank
from tests.harness import run_distributed
from tests.parallel import common
from tests.parallel.common import assert_same_step

EP2 = {"world_size": 4, "pp": 2, "ep": 2}
PROBLEM = ScheduledProblem(num_sequences=16, dtype=FP64)
# Five layers on two stages: the head's stage has fewer of them, so that chunks of a pair differ in length.
UNEVEN = dataclasses.replace(PROBLEM, num_layers=5)


@pytest.mark.parametrize("order", ["megatron", "report"])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_every_gradient_equals_one_process(schedule: str, order: str) -> None:
    problem = UNEVEN if schedule == "dualpipe" else PROBLEM
    layout = ScheduledLayout(**EP2, schedule=schedule, pair_order=order)
    assert_same_step(run_step(layout, problem), reference(problem), 1e-10)
