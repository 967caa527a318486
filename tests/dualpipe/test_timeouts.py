"""A rank that stops is an error on its neighbours that names what is missing, within the time limit."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from dsv3_megatron import cpu
from dsv3_megatron.dualpipe.p2p import late_message
from dsv3_megatron.pipeline import Operation
from tests.dualpipe.common import ScheduledLayout, ScheduledProblem
from tests.harness import run_distributed
from tests.parallel import common

TIMEOUT_S = 0.5


def step_with_stopping_rank(
    rank: int, world_size: int, layout: ScheduledLayout, nccl: bool
) -> tuple[str, float, list[str]]:
    """Rank 1 stands still in its first forward.

    Returns:
        The error, when it came (`time.monotonic()`), and what the watch would have found late until then.
    """
    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    late: list[str] = []
    if nccl or cpu.is_like_nccl():
        # Where a GPU would hang, waits raise, later than the watch sees it.
        cpu.behave_like_nccl(limit_s=4 * TIMEOUT_S)
        threading.Thread(target=look_for_late_messages, args=(late,), daemon=True).start()
    problem = ScheduledProblem(num_sequences=8)
    layout.initialize()
    config = problem.config(layout)
    chunks = common.build_chunks(config, problem)
    common.prepare(chunks, problem)
    schedule = PipelineSchedule(layout.schedule, layout.pp, layout.placement, TIMEOUT_S)

    def stop(*args: Any, **kwargs: Any) -> None:
        time.sleep(6 * TIMEOUT_S)
        raise InterruptedError("stopped")

    with mock.patch.object(common, "forward_step", stop) if rank == 1 else nullcontext():
        try:
            common.step(chunks, problem, problem.global_batch(config.vocab_size), schedule)
        except Exception as error:
            text = f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', ()))}"
            return text, time.monotonic(), late
    return "finished", time.monotonic(), late


def look_for_late_messages(late: list[str]) -> None:
    """As the watch does, more often."""
    while not late:
        time.sleep(0.1)
        late += [message] if (message := late_message()) is not None else []


# In NCCL's order the oldest message is the one that rank 1 would have taken next, where there is one.
NOT_TAKEN = "nobody took activation for stage 1, direction 0, microbatch 1 (rank 0 to rank 1)"
STOPS = {
    "zb1p": ("gradient for stage 0, direction 0, microbatch 0 (rank 1 to rank 0)", NOT_TAKEN),
    "dualpipe": 2 * ("activation for stage 1, direction 1, microbatch 4 (rank 1 to rank 0)",),
    "dualpipev": ("activation for stage 3, direction 0, microbatch 0 (rank 1 to rank 0)", NOT_TAKEN),
}


@pytest.mark.parametrize(
    "schedule, nccl",
    [
        ("zb1p", False),
        ("dualpipe", False),
        ("dualpipe", True),
        pytest.param("dualpipev", False, marks=pytest.mark.slow),
        *(pytest.param(schedule, True, marks=pytest.mark.slow) for schedule in ("zb1p", "dualpipev")),
    ],
)
def test_a_rank_that_stops_is_named(schedule: str, nccl: bool) -> None:
    """Eight microbatches; under DualPipe the second half of them is direction 1."""
    missing, oldest = STOPS[schedule]
    layout = ScheduledLayout(world_size=2, pp=2, schedule=schedule)
    (waiting, gave_up, late), (stopped, woke_up, _) = run_distributed(
        step_with_stopping_rank, 2, timeout=60, layout=layout, nccl=nccl
    )
    assert waiting.startswith(f"PipelineTimeout: pipeline rank 0 got no {missing} within 0.5 s")
    assert "while pipeline rank 0 ran" in waiting
    assert stopped.startswith("InterruptedError: stopped while pipeline rank 1 ran")
    assert gave_up < woke_up
    if nccl:
        (named,) = late
        assert named.startswith("pipeline rank 0 waits for longer than 0.5 s: ") and oldest in named


def test_events_are_asked_on_the_device_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch's thread begins on device 0, where a question would open another context."""
    from dsv3_megatron.dualpipe.p2p.nccl import NcclTransport, _Batch

    entered: list[int] = []
    asked: list[list[int]] = []

    @contextmanager
    def device(number: int) -> Iterator[None]:
        entered.append(number)
        yield
        entered.pop()

    class Work:
        def is_completed(self) -> bool:
            asked.append([*entered])
            return False

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    ends: Any = SimpleNamespace(timeout_s=TIMEOUT_S)
    transport = NcclTransport(ends, cast(Any, None))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # of the thread that asks
    transport._under_way.append(_Batch(Operation("batch"), [Work()]))
    assert transport.late() is None
    assert asked == [[5]] and entered == []
