"""What real steps issue, recorded at torch.distributed and at the stages, is the list of `host_operations`."""

import threading
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from dsv3_megatron import cpu
from dsv3_megatron.cpu import like_nccl
from dsv3_megatron.dualpipe.p2p import PipelineP2P
from dsv3_megatron.pipeline import Message, Operation, Schedule, build_schedule, host_operations
from dsv3_megatron.pipeline.stage import Pass
from tests.harness import run_distributed
from tests.pipeline import toy
from tests.pipeline.test_runner import NAMES

Record = list[tuple[Any, ...]]


def expected(schedule: Schedule, rank: int, backend: str) -> Record:
    """The list as it is seen from outside: posts by their ends and shapes, waits by the post they wait for."""
    record: Record = []
    posted: dict[Message, int] = {}  # received message to the number of its post
    count = 0

    def seen(message: Message) -> tuple[str, int, tuple[int, ...]]:
        sends = message.channel.source == rank
        peer = message.channel.destination if sends else message.channel.source
        return ("send" if sends else "receive", peer, tuple(toy.tensor_spec(message)[0]))

    for operation in host_operations(schedule, rank, backend):  # type: ignore[arg-type]
        if operation.kind == "compute":
            record.append(("compute", str(operation.action)))
        elif operation.kind == "wait":
            record += [("wait", posted[message]) for message in operation.receives]
        else:
            record.append((operation.kind, tuple(seen(m) for m in (*operation.sends, *operation.receives))))
            posted |= dict.fromkeys(operation.receives, count)
            count += 1
    return record


class Recorder:
    """Watches one rank's step from outside of the package."""

    def __init__(self, schedule: Schedule, rank: int, stages: dict[int, Any]) -> None:
        self.record: Record = []
        self.posts: dict[int, int] = {}  # id of a work to the number of its post
        self.works: list[Any] = []  # kept, so that ids stay apart
        self.actions = {part: action for action in schedule.ranks[rank] for part in action.parts}
        self.thread = threading.get_ident()
        for stage in stages.values():
            for name in ("forward", "backward", "backward_input", "backward_weight"):
                setattr(stage, name, self.computing(getattr(stage, name)))

    def computing(self, method: Any) -> Any:
        def compute(which: Pass, *tensors: Any) -> Any:
            entry = ("compute", str(self.actions[which.action]))
            if entry not in self.record:  # the first half of a pair
                self.record.append(entry)
            return method(which, *tensors)

        return compute

    def post(self, kind: str, ends: tuple[Any, ...], works: list[Any]) -> None:
        for work in works:
            self.posts[id(work)] = len(self.posts)
            self.works.append(work)
        self.record.append((kind, ends))

    def waited(self, work: Any) -> None:
        if threading.get_ident() == self.thread and id(work) in self.posts:
            self.record.append(("wait", self.posts[id(work)]))

    def patches(self) -> list[Any]:
        isend, irecv, batch = dist.isend, dist.irecv, dist.batch_isend_irecv

        def recorded_isend(tensor: Any, dst: int, group: Any = None) -> Any:
            work = isend(tensor, dst, group)
            self.post("isend", (("send", dst, tuple(tensor.shape)),), [work])
            return work

        def recorded_irecv(tensor: Any, src: int, group: Any = None) -> Any:
            work = irecv(tensor, src, group)
            self.post("irecv", (("receive", src, tuple(tensor.shape)),), [work])
            return work

        def recorded_batch(ops: list[dist.P2POp]) -> Any:
            names = {isend: "send", irecv: "receive"}
            works = batch(ops)
            self.post("batch", tuple((names[o.op], o.peer, tuple(o.tensor.shape)) for o in ops), works)
            return works

        owner = like_nccl.Work if cpu.is_like_nccl() else dist.Work
        wait = owner.wait

        def recorded_wait(work: Any, *limit: Any) -> Any:
            self.waited(work)
            return wait(work, *limit)

        patches = [mock.patch.object(owner, "wait", recorded_wait)]
        if cpu.is_like_nccl():
            return [*patches, mock.patch.object(dist, "batch_isend_irecv", recorded_batch)]
        return [
            *patches,
            mock.patch.object(dist, "isend", recorded_isend),
            mock.patch.object(dist, "irecv", recorded_irecv),
        ]


def recorded(rank: int, world_size: int, names: list[tuple[str, int]], nccl: bool) -> list[tuple]:
    """For each schedule: its expected and its recorded step."""
    if nccl:
        cpu.behave_like_nccl(limit_s=30)
    p2p = PipelineP2P(list(range(world_size)), toy.tensor_spec, timeout_s=30)
    assert p2p.backend == ("nccl" if nccl else "gloo")
    result = []
    for name, num_microbatches in names:
        for forward_only in (False, True):
            schedule = build_schedule(name, world_size, num_microbatches)
            schedule = schedule.forward_only() if forward_only else schedule
            runner, stages = toy.build(schedule, rank, p2p)
            recorder = Recorder(schedule, rank, stages)
            for patch in recorder.patches():
                patch.start()
            runner.step()
            mock.patch.stopall()
            dist.barrier()
            result.append((name, expected(schedule, rank, p2p.backend), recorder.record))
    return result


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_issue_exactly_the_list(world_size: int, backend: str) -> None:
    ranks = run_distributed(
        recorded, world_size, timeout=120, names=NAMES[world_size], nccl=backend == "nccl"
    )
    for rank in ranks:
        assert len(rank) == 2 * len(NAMES[world_size])
        for name, listed, issued in rank:
            assert issued == listed, name
            kinds = {entry[0] for entry in issued}
            assert kinds <= ({"batch"} if backend == "nccl" else {"isend", "irecv"}) | {"wait", "compute"}


def test_the_record_is_not_that_of_another_list() -> None:
    """The comparison fails for the other backend's list, and for a list with two operations exchanged."""
    schedule = build_schedule("dualpipe", 4, 10)
    for rank in range(4):
        listed = expected(schedule, rank, "nccl")
        assert listed != expected(schedule, rank, "gloo")
        operations = host_operations(schedule, rank)
        first = next(i for i, o in enumerate(operations) if o.kind == "compute")
        exchanged: list[Operation] = [*operations]
        exchanged[first], exchanged[first + 1] = exchanged[first + 1], exchanged[first]
        with mock.patch("tests.pipeline.test_recorded.host_operations", lambda *_, issued=exchanged: issued):
            assert expected(schedule, rank, "nccl") != listed
