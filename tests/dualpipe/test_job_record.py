"""The communicators of a job of 2048 ranks, recorded one rank at a time: real groups, a real step of a tiny model.

PP16 × EP64 with DeepSeek-V3's layers and experts, under DualPipe, on torch's fake backend. Records of ranks that share
communicators must agree, and the model of devices (`pipeline/device.py`) runs what they issued.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.cpu.communicators import Group, Issued, Record, Waited, record_communicators
from dsv3_megatron.dualpipe.ranks import Placement
from dsv3_megatron.pipeline import build_schedule, host_operations
from dsv3_megatron.pipeline.device import Deadlock, Device, HostWait, Instruction, Launch, Rendezvous, execute
from tests.dualpipe.common import ScheduledLayout, ScheduledProblem
from tests.harness import run_distributed
from tests.parallel import common

WORLD, PP, EP = 2048, 16, 64
PER_DIRECTION = 16
PLACEMENT = Placement("dualpipe", PP)
DDP = (("use_distributed_optimizer", True), ("overlap_grad_reduce", True))


class Done:
    def wait(self, *_: Any) -> bool:
        return True


def all_to_all_of_nothing(self: Any, output: torch.Tensor, *_: Any) -> Done:
    """Splits of the fake backend's ranks do not fit each other; what arrives does not matter here."""
    with torch.no_grad():
        output.zero_()
    return Done()


def record_rank(rank: int, world_size: int, ranks: Sequence[int]) -> Record:
    """What rank `ranks[rank]` of the job makes and issues, from its first group to the end of its first step."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dsv3_megatron.dualpipe import microbatch_data
    from dsv3_megatron.dualpipe.schedule import PipelineSchedule

    dist.init_process_group("fake", store=FakeStore(), rank=ranks[rank], world_size=WORLD)
    layout = ScheduledLayout(world_size=WORLD, pp=PP, ep=EP, schedule="dualpipe")
    problem = ScheduledProblem(
        num_sequences=PER_DIRECTION * WORLD // PP * 2,
        num_layers=61,
        overrides=(("num_moe_experts", 256),),
        ddp=DDP,
    )
    new_group, swap_tensors = dist.new_group, microbatch_data._swap_tensors

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": None})

    def swapped(send: torch.Tensor, receive: torch.Tensor, *ends: Any) -> None:
        swap_tensors(send, receive, *ends)
        receive.copy_(send)

    for name in ("all_to_all_single", "alltoall_base"):
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, all_to_all_of_nothing)
    dist.new_group = fake_group
    microbatch_data._swap_tensors = swapped  # type: ignore[assignment]
    dist.broadcast_object_list = lambda *_, **__: None
    with record_communicators() as record:
        layout.initialize()
        config = problem.config(layout)
        chunks = common.build_chunks(config, problem)
        common.prepare(chunks, problem)
        schedule = PipelineSchedule("dualpipe", PP, layout.placement, 60)
        schedule.pairs.thread = None  # as on a GPU: one thread issues, Megatron's own order
        common.step(chunks, problem, problem.global_batch(config.vocab_size), schedule)
    return record


def records_of(ranks: Sequence[int], at_once: int = 4) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for start in range(0, len(ranks), at_once):
        some = ranks[start : start + at_once]
        values = run_distributed(record_rank, len(some), timeout=400, init=False, ranks=list(some))
        found |= dict(zip(some, values, strict=True))
    return found


# --- what must agree


def check_groups(records: dict[int, Record]) -> None:
    """All ranks make the same groups in one order, and the members of each know it by one name."""
    lists = [[group.ranks for group in record.groups] for record in records.values()]
    assert all(made == lists[0] for made in lists)
    for place, ranks in enumerate(lists[0]):
        names = {records[rank].groups[place].name for rank in set(ranks) & set(records)}
        assert len(names) <= 1 and None not in names, (ranks, names)


def check_sequences(records: dict[int, Record]) -> int:
    """The same collectives in one order on each communicator at all its ranks; messages in one order at both ends.

    Returns:
        How many communicators have several recorded ranks.
    """
    collectives: defaultdict[str, dict[int, list[str]]] = defaultdict(dict)
    sent: defaultdict[tuple[str, int, int], int] = defaultdict(int)
    received: defaultdict[tuple[str, int, int], int] = defaultdict(int)
    for rank, record in records.items():
        for issued in record.issued:
            if isinstance(issued, Waited):
                continue
            own = collectives[issued.group].setdefault(rank, [])
            if issued.kind != "batch":
                own.append(issued.kind)
            for peer in issued.sends:
                sent[issued.group, rank, peer] += 1
            for peer in issued.receives:
                received[issued.group, peer, rank] += 1
    for group, by_rank in collectives.items():
        first = next(iter(by_rank.values()))
        assert all(own == first for own in by_rank.values()), group
    for group, a, b in sent.keys() | received.keys():
        if a in records and b in records:
            assert sent[group, a, b] == received[group, a, b], (group, a, b)
    return sum(len(by_rank) > 1 for by_rank in collectives.values())


def programs_of(records: dict[int, Record], wait_for_device: bool) -> list[list[Instruction]]:
    """For `device.execute`: each operation behind a piece of computing that uses what was waited for before."""
    programs = []
    for rank, record in records.items():
        program: list[Instruction] = []
        place_of: dict[int, int] = {}  # issued to launch
        used: set[str] = set()
        numbers: Counter = Counter()
        waited: tuple[int, ...] = ()
        for place, issued in enumerate(record.issued):
            if isinstance(issued, Waited):
                waited += (place_of[issued.place],)
                continue
            present = [other for other in record.members[issued.group] if other in records]
            if issued.group not in used:
                used.add(issued.group)
                program.append(Rendezvous(issued.group))
            program.append(Launch("compute", waited, 1, what="computing"))
            waited = ()
            computed = len(program) - 1
            if wait_for_device:
                program.append(HostWait())
            ends = [(rank, peer) for peer in issued.sends] + [(peer, rank) for peer in issued.receives]
            if issued.kind != "batch":
                ends = [(-1, -1)] if len(present) > 1 else []
            meetings = []
            for end in ends:
                if end == (-1, -1) or set(end) <= records.keys():
                    meetings.append((issued.group, *end, numbers[issued.group, end]))
                    numbers[issued.group, end] += 1
            needs = () if issued.kind == "batch" and not issued.sends else (computed,)
            program.append(Launch(issued.group, needs, 0.1, tuple(meetings), what=issued))
            place_of[place] = len(program) - 1
        programs.append(program)
    return programs


CONDITIONS = [
    (Device(), False),
    (Device(queues=1), False),
    (Device(queues=1, residents=3), False),
    (Device(queues=1), True),
]


def check_devices(records: dict[int, Record]) -> None:
    """Nothing hangs: with many queues and with one, with room for three kernels, with waits for the device."""
    for device, wait_for_device in CONDITIONS:
        execute(programs_of(records, wait_for_device), device)


def check_messages(records: dict[int, Record]) -> None:
    """The batches on the pipeline's communicator, after its first use, are the list of `host_operations`."""
    schedule = build_schedule("dualpipe", PP, 2 * PER_DIRECTION)
    for rank, record in records.items():
        pipeline = PLACEMENT.pipeline_ranks(rank, WORLD)
        batches = [
            (issued.sends, issued.receives)
            for issued in record.issued
            if isinstance(issued, Issued)
            and issued.kind == "batch"
            and record.members[issued.group] == tuple(sorted(pipeline))
        ]
        operations = host_operations(schedule, PLACEMENT.pipeline_rank(rank, WORLD))
        assert batches[1:] == [
            (
                tuple(pipeline[m.channel.destination] for m in o.sends),
                tuple(pipeline[m.channel.source] for m in o.receives),
            )
            for o in operations
            if o.kind == "batch"
        ]


def check(records: dict[int, Record]) -> int:
    check_groups(records)
    check_messages(records)
    check_devices(records)
    return check_sequences(records)


# --- the tests


@pytest.fixture(scope="module")
def some() -> dict[int, Record]:
    """Pipeline ranks 0 and 15, which are mirrors, 1, and the neighbour of 0 in its expert-parallel group."""
    pipeline = PLACEMENT.pipeline_ranks(0, WORLD)
    return records_of([pipeline[0], pipeline[0] + 1, pipeline[15], pipeline[1]])


def test_ranks_that_share_communicators_agree(some) -> None:
    assert check(some) >= 4  # expert-parallel twice, data-parallel with the mirror, the pipeline


def test_one_communicator_per_pipeline(some) -> None:
    """128 groups more than Megatron makes, on every rank; a rank is in one of them."""
    for rank, record in some.items():
        pipelines = [group for group in record.groups if len(group.ranks) == PP]
        made = [group for group in pipelines if list(group.ranks) in PLACEMENT.pipelines(WORLD)]
        assert len(made) == WORLD // PP
        assert [group.name is not None for group in made].count(True) == 1
        assert rank in next(group.ranks for group in made if group.name is not None)


def test_a_communicator_is_first_used_before_the_step(some) -> None:
    """By a collective of all its ranks: all that comes later, batches too, finds it made."""
    for record in some.values():
        operations = [issued for issued in record.issued if isinstance(issued, Issued)]
        first_message = next(
            place
            for place, issued in enumerate(operations)
            if issued.kind == "batch" and len(record.members[issued.group]) == PP
        )
        in_step = {issued.group for issued in operations[first_message:] if issued.kind != "allreduce"}
        for group in in_step:
            first = next(issued for issued in operations if issued.group == group)
            assert first.kind == "allreduce", (group, first)


def test_disagreeing_records_are_found(some) -> None:
    first = next(iter(some))
    record = some[first]
    batches = [i for i, o in enumerate(record.issued) if isinstance(o, Issued) and o.kind == "batch"]
    i, j = next((i, j) for i, j in itertools.pairwise(batches[5:]) if record.issued[i] != record.issued[j])
    swapped = [*record.issued]
    swapped[i], swapped[j] = swapped[j], swapped[i]
    with pytest.raises(AssertionError):
        check_messages({first: Record(record.groups, swapped, record.members)})

    shared = next(o for o in record.issued if isinstance(o, Issued) and o.kind == "all_to_all_single")
    one_more = [*record.issued, shared]
    more = {**some, first: Record(record.groups, one_more, record.members)}
    with pytest.raises(AssertionError):
        check_sequences(more)
    with pytest.raises(Deadlock):
        check_devices(more)

    renamed = [Group(g.ranks, None if g.name is None else g.name + "x") for g in record.groups]
    with pytest.raises(AssertionError):
        check_groups({**some, first: Record(renamed, record.issued, record.members)})


def names_as_before(rank: int, world_size: int, ranks: Sequence[int]) -> str:
    """The name of this rank's pipeline as torch 2.11 hashes it, made by its members alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=ranks[rank], world_size=WORLD)
    c10d = dist.distributed_c10d

    def of_torch_2_11(members: Sequence[int]) -> str:
        text = "_".join([*map(str, members), str(len(c10d._world.pg_names))])
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    new_group = dist.new_group
    with mock.patch.object(dist, "new_group", lambda *a, **k: new_group(*a, **{**k, "backend": None})):
        ScheduledLayout(world_size=WORLD, pp=PP, ep=EP, schedule="dualpipe").initialize()
    with mock.patch.object(c10d, "_hash_ranks_to_str", of_torch_2_11):
        pipeline = sorted(PLACEMENT.pipeline_ranks(ranks[rank], WORLD))
        return dist.new_group(pipeline, use_local_synchronization=True).group_name


def test_groups_made_by_their_members_alone_had_different_names() -> None:
    pipeline = PLACEMENT.pipeline_ranks(0, WORLD)
    names = run_distributed(names_as_before, 3, timeout=200, init=False, ranks=pipeline[:3])
    assert len(set(names)) > 1


@pytest.mark.slow
def test_two_whole_pipelines_agree() -> None:
    """One rank per pipeline position, each with its neighbour."""
    columns = [PLACEMENT.pipeline_ranks(column, WORLD) for column in (0, 1)]
    records = records_of([rank for pair in zip(*columns, strict=True) for rank in pair])
    assert len(records) == 2 * PP
    assert check(records) >= 2 * PP
