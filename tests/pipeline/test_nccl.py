"""Steps on the model of NCCL: ours end whatever they meet, receives posted ahead hang, one stream is fast enough."""

import importlib
import itertools

import pytest

from dsv3_megatron.pipeline import (
    SCHEDULES,
    Costs,
    Schedule,
    ScheduleError,
    build_schedule,
    host_operations,
    simulate,
    validate,
)
from dsv3_megatron.pipeline.comms import Batch
from dsv3_megatron.pipeline.device import Deadlock, Device
from dsv3_megatron.pipeline.nccl import CONDITIONS, TAIL, WORST, Conditions, run_on_nccl, simulate_one_stream
from dsv3_megatron.pipeline.operations import Operation
from dsv3_megatron.pipeline.show import main as show
from tests.pipeline.test_validate import GRID, allowed, naive_program


def posted_ahead(schedule: Schedule, receives_ahead: int = 2) -> list[list[Operation]]:
    return [host_operations(schedule, rank, "gloo", receives_ahead) for rank in range(schedule.num_ranks)]


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_condition_stops_a_step(name, conditions):
    large = ((8, 20), (16, 32)) if conditions == WORST else ()
    for num_ranks, num_microbatches in ((2, 4), (2, 8), (3, 6), (4, 8), (4, 12), (6, 12), *large):
        if allowed(name, num_ranks, num_microbatches) and not (name == "dualpipe" and num_ranks % 2):
            schedule = build_schedule(name, num_ranks, num_microbatches)
            assert len(run_on_nccl(schedule, conditions=conditions).events) == sum(map(len, schedule.ranks))
            run_on_nccl(schedule.forward_only(), conditions=conditions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, num_ranks",
    [(name, ranks) for name in GRID for ranks in range(2, 33) if name != "dualpipe" or ranks % 2 == 0],
)
def test_no_condition_stops_a_step_full_grid(name, num_ranks):
    """All even numbers of microbatches to 4·P under the worst, and under each condition alone at three of them."""
    counts = [m for m in range(2, 4 * num_ranks + 1, 2) if allowed(name, num_ranks, m)]
    assert counts
    for num_microbatches in counts:
        schedule = build_schedule(name, num_ranks, num_microbatches)
        operations = [host_operations(schedule, rank) for rank in range(num_ranks)]
        some = num_microbatches in (counts[0], counts[len(counts) // 2], counts[-1])
        for conditions in CONDITIONS if some else (WORST,):
            run_on_nccl(schedule, operations, conditions)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("num_ranks", [*range(2, 13), 16, 24, 32])
def test_no_condition_stops_a_zigzag_full_grid(num_ranks, chunks):
    """As above; a zigzag is searched for, not written down, so that large ones are built at three batches only."""
    counts = list(range(2, 4 * num_ranks + 1, 2))
    some = (counts[0], counts[len(counts) // 2], counts[-1])
    for num_microbatches in counts if num_ranks <= 8 and chunks == 2 else some:
        schedule = build_schedule("zigzag", num_ranks, num_microbatches, chunks=chunks)
        operations = [host_operations(schedule, rank) for rank in range(num_ranks)]
        for conditions in CONDITIONS if num_microbatches in some else (WORST,):
            run_on_nccl(schedule, operations, conditions)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_posted_ahead_on_communicators_made_at_first_use_hang(name, num_ranks):
    """The order before: with nothing else in the way, both ends of a pair stand in the making of another one."""
    schedule = build_schedule(name, num_ranks, 4 * num_ranks)
    with pytest.raises(Deadlock, match="rank 0 host at"):
        run_on_nccl(schedule, posted_ahead(schedule), Conditions())


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_two_receives_ahead_hang_on_one_hardware_queue(name, num_ranks):
    """Though their communicators are there: the second stands in front of the action that must feed the first."""
    schedule = build_schedule(name, num_ranks, 4 * num_ranks)
    operations = posted_ahead(schedule)
    with pytest.raises(Deadlock, match="held up: irecv"):
        run_on_nccl(schedule, operations, Conditions(Device(queues=1)), made_before=True)
    run_on_nccl(schedule, operations, Conditions(), made_before=True)  # it is the queue


@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_ahead_hang_where_the_host_waits_for_the_device_or_kernels_do_not_fit(name):
    schedule = build_schedule(name, 4, 16)
    for conditions in (Conditions(wait_for_device=True), Conditions(Device(residents=2))):
        with pytest.raises(Deadlock):
            run_on_nccl(schedule, posted_ahead(schedule), conditions, made_before=True)


def batched(programs) -> list[list[Operation]]:
    operations = []
    for program in programs:
        mine = []
        for item in program:
            if isinstance(item, Batch):
                mine += [Operation("batch", item.sends, item.receives)]
                mine += [Operation("wait", receives=item.receives)] if item.receives else []
            else:
                mine.append(Operation("compute", action=item))
        operations.append(mine)
    return operations


def test_batches_alone_do_not_save_a_wrong_order():
    """Each rank posts what it needs next with what it has just made: wrong at DualPipe's turning points."""
    one_f_one_b = build_schedule("1f1b", 4, 8)
    run_on_nccl(one_f_one_b, batched(naive_program(one_f_one_b)))
    schedule = build_schedule("dualpipe", 4, 8)
    for conditions in CONDITIONS:
        with pytest.raises(Deadlock):
            run_on_nccl(schedule, batched(naive_program(schedule)), conditions)


def test_a_swapped_batch_is_found():
    """Two batches of one rank in the other order: its neighbours wait in the order that all agreed on."""
    schedule = build_schedule("dualpipe", 4, 12)
    operations = [host_operations(schedule, rank) for rank in range(4)]
    batches = [i for i, o in enumerate(operations[1]) if o.kind == "batch"]
    found = 0
    for i, j in itertools.pairwise(batches):
        broken = list(operations[1])
        broken[i], broken[j] = broken[j], broken[i]
        try:
            run_on_nccl(schedule, [operations[0], broken, *operations[2:]], Conditions(Device(queues=1)))
        except (Deadlock, KeyError):  # KeyError: sent before it is made
            found += 1
    assert found > len(batches) / 2


def test_free_messages_on_one_stream_are_the_simulation():
    for name in SCHEDULES:
        schedule = build_schedule(name, 4, 16)
        costs = Costs(f=1.25, b=2.5, w=0.75, fb=3.5)
        one_stream, free = simulate_one_stream(schedule, costs), simulate(schedule, costs)
        assert one_stream.makespan == pytest.approx(free.makespan)
        for ours, theirs in zip(one_stream.events, free.events, strict=True):
            assert ours.action == theirs.action and ours[1:3] == pytest.approx(theirs[1:3])


@pytest.mark.parametrize("num_ranks, num_microbatches", [(8, 20), (16, 120)])
def test_dualpipe_on_one_communication_stream_is_within_1_percent_of_free_messages(
    num_ranks, num_microbatches
):
    schedule = build_schedule("dualpipe", num_ranks, num_microbatches)
    costs = Costs(f=1, b=2, w=1, fb=3)
    free = simulate(schedule, costs).makespan
    messages = Costs(f=1, b=2, w=1, fb=3, p2p=0.05)
    assert simulate_one_stream(schedule, messages, TAIL).makespan < 1.01 * free
    # Where results leave at the very end of a pair, the time of the messages alone is more, whatever their order: every
    # pair waits for two that were made right before it. One stream adds 0.1%.
    many_streams = simulate(schedule, messages).makespan
    assert many_streams > 1.015 * free
    assert simulate_one_stream(schedule, messages).makespan < 1.0015 * many_streams


def test_the_order_matters_for_one_stream():
    """All that comes between two actions in one batch, urgent or not: ZB1P's step is 2% longer."""
    schedule = build_schedule("zb1p", 8, 32)
    costs = Costs(p2p=0.05)
    operations = [host_operations(schedule, rank) for rank in range(8)]
    merged = [merge(issued) for issued in operations]
    ours = run_on_nccl(schedule, operations, Conditions(), costs).makespan
    theirs = run_on_nccl(schedule, merged, Conditions(), costs).makespan
    assert ours == pytest.approx(simulate(schedule, costs).makespan)
    assert theirs > 1.015 * ours


def merge(operations: list[Operation]) -> list[Operation]:
    merged: list[Operation] = []
    for operation in operations:
        if operation.kind == "batch" and merged and merged[-1].kind == "batch":
            last = merged.pop()
            operation = Operation("batch", last.sends + operation.sends, last.receives + operation.receives)
        merged.append(operation)
    return merged


def test_a_tail_must_not_be_negative():
    with pytest.raises(ValueError, match="tail=-1 is not a duration"):
        simulate_one_stream(build_schedule("1f1b", 2, 2), Costs(), tail=-1)


def test_validate_runs_the_model(monkeypatch):
    module = importlib.import_module("dsv3_megatron.pipeline.validate")
    schedule = build_schedule("dualpipe", 4, 8)
    validate(schedule)
    monkeypatch.setattr(
        module, "run_on_nccl", lambda schedule: run_on_nccl(schedule, posted_ahead(schedule), Conditions())
    )
    with pytest.raises(
        ScheduleError, match="deadlock on NCCL with 1 hardware queue, room for 1 waiting kernel"
    ):
        validate(schedule)


def test_show_prints_what_messages_cost_on_one_stream(capsys):
    show(["dualpipe", "--ranks", "8", "--microbatches", "20", "--text-only"])
    out = capsys.readouterr().out
    assert (
        "one communication stream, messages of 0.05 F: makespan 66.53, +0.80% of the 66 with free messages"
        in out
    )
    show(["dualpipe", "--ranks", "16", "--microbatches", "120", "--text-only"])
    assert "makespan 375.21, +0.32% of the 374 with free messages" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        show(["dualpipe", "--text-only", "--message", "-1"])
    assert "--message -1.0 is not a duration" in capsys.readouterr().err
