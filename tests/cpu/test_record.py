"""The record of stand-in streams reports every missing wait that we put in, and nothing else."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.cpu import record_streams
from dsv3_megatron.cpu.record import Recorder
from tests.harness import run_distributed

SIDE = torch.cuda.Stream(name="side")


def main_stream() -> torch.cuda.Stream:
    return torch.cuda.current_stream()


def wait_stream() -> None:
    SIDE.wait_stream(main_stream())


def wait_event() -> None:
    event = torch.cuda.Event()
    event.record()
    event.wait(SIDE)


def wait_recorded_event() -> None:
    SIDE.wait_event(main_stream().record_event())


def event_synchronize() -> None:
    main_stream().record_event().synchronize()


def host_reads_value() -> None:
    torch.ones(1).add(1).item()


WAITS = [
    wait_stream,
    wait_event,
    wait_recorded_event,
    event_synchronize,
    torch.cuda.synchronize,
    lambda: main_stream().synchronize(),
    host_reads_value,
]


def write_then_read(wait: Callable[[], object]) -> Recorder:
    with record_streams() as record:
        x = torch.zeros(4)
        wait()
        with torch.cuda.stream(SIDE):
            x.add(1)
    return record


def write_then_write(wait: Callable[[], object]) -> Recorder:
    with record_streams() as record:
        x = torch.zeros(4)
        wait()
        with torch.cuda.stream(SIDE):
            x.copy_(torch.ones(4))
    return record


def read_then_write(wait: Callable[[], object]) -> Recorder:
    x = torch.zeros(4)
    with record_streams() as record:
        x.add(1)
        wait()
        with torch.cuda.stream(SIDE):
            x.fill_(2)
    return record


@pytest.mark.parametrize("program", [write_then_read, write_then_write, read_then_write])
def test_a_missing_wait_is_reported_and_each_kind_of_wait_satisfies(program):
    (violation,) = program(lambda: None).violations
    assert violation.second.stream is SIDE and violation.first.stream is main_stream()
    assert violation.tensor == "float32[4]"
    assert f"test_record:{program.__code__.co_firstlineno}"[:12] in violation.second.location
    assert program.__name__ in str(violation) and "does not wait for" in str(violation)
    for wait in WAITS:
        assert program(wait).violations == []


def test_a_wait_in_the_wrong_direction_or_too_early_is_no_wait():
    early = torch.cuda.Event()

    def record_early() -> Recorder:
        with record_streams() as record:
            early.record()
            x = torch.zeros(4)
            early.wait(SIDE)
            with torch.cuda.stream(SIDE):
                x.add(1)
        return record

    assert len(record_early().violations) == 1
    assert len(write_then_read(lambda: main_stream().wait_stream(SIDE)).violations) == 1


def test_waits_are_transitive_across_streams():
    other = torch.cuda.Stream()
    with record_streams() as record:
        x = torch.zeros(4)
        other.wait_stream(main_stream())
        SIDE.wait_stream(other)
        with torch.cuda.stream(SIDE):
            x.add_(1)
    assert record.violations == []
    assert record.num_operations[SIDE] == 1 and record.num_operations[main_stream()] == 1


def test_parts_of_a_buffer_are_told_apart():
    buffer = torch.zeros(8)
    with record_streams() as record:
        buffer[:4].add_(1)
        with torch.cuda.stream(SIDE):
            buffer[4:].add_(1)
        assert record.violations == []
        with torch.cuda.stream(SIDE):
            buffer[3:5].mul_(2)
    assert [violation.tensor for violation in record.violations] == ["float32[2]"]


def test_views_share_memory_and_new_memory_is_new():
    with record_streams() as record:
        x = torch.zeros(4, 4)
        with torch.cuda.stream(SIDE):
            x.t()  # metadata only
            x.view(16)[:2].detach()
            torch.empty(4).fill_(1)
        assert record.violations == []
        with torch.cuda.stream(SIDE):
            x.t().contiguous()
    assert len(record.violations) == 1


def test_backward_runs_on_the_stream_of_its_forward():
    """Autograd itself orders the streams of one backward; what the program does around it needs waits."""

    def program(wait_before: bool, wait_after: bool, wait_grad: bool) -> Recorder:
        w = torch.nn.Parameter(torch.ones(4))
        with record_streams() as record:
            y = w * 2
            if wait_before:
                SIDE.wait_stream(main_stream())
            with torch.cuda.stream(SIDE):
                z = (y * y).exp()
            if wait_after:
                main_stream().wait_stream(SIDE)
            z.sum().backward()
            if wait_grad:
                SIDE.wait_stream(main_stream())
            with torch.cuda.stream(SIDE):
                w.grad.mul_(1)
        # forward: mul, exp; backward of exp and of y * y; then w.grad
        assert record.num_operations[SIDE] >= 5
        return record

    assert program(True, True, True).violations == []
    missing = [str(program(*waits).violations[0]) for waits in [(0, 1, 1), (1, 0, 1), (1, 1, 0)]]
    assert "aten::mul on <side>" in missing[0]
    assert "aten::sum on <default stream>" in missing[1]
    assert "aten::mul_ on <side>" in missing[2]


def test_a_stream_set_inside_backward_counts():
    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.cuda.stream(SIDE):
                return grad.clone()

    x = torch.ones(2, requires_grad=True)
    with record_streams() as record:
        Copy.apply(x * 1).sum().backward()
    assert any(violation.second.stream is SIDE for violation in record.violations)


def test_nothing_is_recorded_outside_the_block():
    from dsv3_megatron.cpu import streams

    with record_streams(), pytest.raises(RuntimeError, match="does not nest"):
        record_streams().__enter__()
    assert streams.recorder is None
    assert dist.Work.wait.__qualname__ != "record_streams.<locals>.recorded_wait"


def collectives(rank: int, world_size: int) -> dict[str, list[str]]:
    def all_reduce(x, y):
        return dist.all_reduce(x, async_op=True), x

    def all_gather(x, y):
        return dist.all_gather_into_tensor(y, x, async_op=True), y

    def reduce_scatter(x, y):
        return dist.reduce_scatter_tensor(x, y, async_op=True), x

    def all_to_all(x, y):
        return dist.all_to_all_single(y[:4], x, [2, 2], [2, 2], async_op=True), y

    def receive(x, y):
        operations = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y[:4], 1 - rank)]
        works = dist.batch_isend_irecv(operations)

        class Both:
            def wait(self):
                for work in works:
                    work.wait()

        return Both(), y

    def coalesced(x, y):
        with dist._coalescing_manager(async_ops=True) as manager:
            dist.all_reduce(x)
            dist.all_reduce(y)
        return manager, y

    found = {}
    for collective in (all_reduce, all_gather, reduce_scatter, all_to_all, receive, coalesced):
        for waits in (True, False):
            x, y = torch.ones(4), torch.ones(8)
            with record_streams() as record:
                x.mul_(2), y.mul_(2)
                work, result = collective(x, y)
                if waits:
                    work.wait()
                result.add(1)
            if not waits:
                work.wait()
            found[f"{collective.__name__} {waits}"] = [str(violation) for violation in record.violations]
    with record_streams() as record:
        x, y = torch.ones(4), torch.ones(8)
        dist.all_reduce(x)  # not asynchronous: waits
        x.add(1)
        work = dist.all_gather_into_tensor(y, x, async_op=True)
        x.add(1)  # reads what is read
        assert record.violations == []
        x.add_(1)  # writes what is read
        work.wait()
    found["write input"] = [str(violation) for violation in record.violations]
    return found


def test_asynchronous_collectives_must_be_waited_for():
    for found in run_distributed(collectives, world_size=2, timeout=60):
        for name, violations in found.items():
            if name.endswith("True"):
                assert violations == [], name
            else:
                assert len(violations) == 1 and "test_record" in violations[0], (name, violations)
        assert "aten::add_" in found["write input"][0]
