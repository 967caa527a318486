"""The checker accepts every schedule that is built, and refuses damaged ones by name."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.pipeline import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    build_schedule,
    simulate,
    validate,
)
from dsv3_megatron.pipeline.comms import Batch, blocking_program, channel_orders, receives, sends
from dsv3_megatron.pipeline.validate import check_blocking

# Zigzag's tables come out of a search; its grid is in test_zigzag.py.
GRID = [name for name in SCHEDULES if name != "zigzag"]


def allowed(name: str, num_ranks: int, num_microbatches: int) -> bool:
    if name == "interleaved_1f1b_overlap":
        return num_microbatches >= num_ranks and num_microbatches % num_ranks == 0
    if name in ("dualpipe", "dualpipev"):
        return num_microbatches >= 2 * num_ranks and (name == "dualpipev" or num_microbatches % 2 == 0)
    return True


@st.composite
def sizes(draw):
    """Schedule name, even ranks 2–16 (the full grid goes to 32), microbatches up to eight times as many."""
    name = draw(st.sampled_from(SCHEDULES))
    num_ranks = 2 * draw(st.integers(1, 8))
    if name == "interleaved_1f1b_overlap":
        return name, num_ranks, num_ranks * draw(st.integers(1, 8))
    fewest = 2 * num_ranks if name.startswith("dualpipe") else 1
    if name == "zigzag":  # built by a search: small ones here, a grid of its own in test_zigzag.py
        return name, min(num_ranks, 6), draw(st.integers(fewest, 3 * min(num_ranks, 6)))
    num_microbatches = draw(st.integers(fewest, 8 * num_ranks))
    return name, num_ranks, num_microbatches + (name == "dualpipe" and num_microbatches % 2)


def check_everything(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule = build_schedule(name, num_ranks, num_microbatches)
    report = validate(schedule)
    simulation = simulate(schedule)
    assert report.peak_in_flight == simulation.peak_in_flight
    assert min(simulation.bubble) >= 0
    # Each stage boundary between two ranks is crossed by every microbatch once forward and once backward.
    boundaries = sum(
        held != following for ranks in schedule.placement for held, following in itertools.pairwise(ranks)
    )
    assert report.num_messages == 2 * boundaries * num_microbatches / schedule.num_directions
    if name in ("1f1b", "interleaved_1f1b_overlap"):
        assert report.peak_weight_queue == (0,) * num_ranks


@settings(max_examples=30)
@given(sizes())
def test_every_built_schedule_is_valid(case):
    check_everything(*case)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", range(2, 33, 2))
@pytest.mark.parametrize("name", GRID)
def test_every_built_schedule_is_valid_full_grid(name, num_ranks):
    for num_microbatches in range(1, 8 * num_ranks + 1):
        if allowed(name, num_ranks, num_microbatches):
            check_everything(name, num_ranks, num_microbatches)


def replace_rank(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    ranks = [*schedule.ranks]
    ranks[rank] = tuple(actions)
    return dataclasses.replace(schedule, ranks=tuple(ranks))


def swap(schedule: Schedule, rank: int, i: int, j: int) -> Schedule:
    actions = [*schedule.ranks[rank]]
    actions[i], actions[j] = actions[j], actions[i]
    return replace_rank(schedule, rank, actions)


DUALPIPE = build_schedule("dualpipe", 4, 8)


def test_a_missing_backward_is_refused():
    actions = [*build_schedule("1f1b", 2, 3).ranks[1]]
    broken = replace_rank(build_schedule("1f1b", 2, 3), 1, actions[:-1])
    with pytest.raises(ScheduleError, match=r"rank 1: F2@1 has no backward"):
        validate(broken)


def test_a_missing_microbatch_is_refused():
    schedule = build_schedule("1f1b", 2, 3)
    broken = replace_rank(schedule, 1, [action for action in schedule.ranks[1] if action.microbatch != 1])
    with pytest.raises(ScheduleError, match=r"rank 1: F1@1 is missing"):
        validate(broken)


def test_a_second_forward_is_refused():
    with pytest.raises(ScheduleError, match=r"rank 0, F0@0 .*runs twice"):
        validate(replace_rank(DUALPIPE, 0, [DUALPIPE.ranks[0][0], *DUALPIPE.ranks[0]]))


def test_a_second_backward_is_refused():
    schedule = build_schedule("1f1b", 2, 3)
    with pytest.raises(ScheduleError, match=r"rank 0, B2@0 .*runs twice"):
        validate(replace_rank(schedule, 0, [*schedule.ranks[0], schedule.ranks[0][-1]]))


def test_weight_gradients_left_over_are_refused():
    with pytest.raises(ScheduleError, match=r"rank 2: 1 weight gradients are left"):
        validate(replace_rank(DUALPIPE, 2, [*DUALPIPE.ranks[2][:-1]]))


def test_weight_gradients_out_of_order_are_refused():
    last = len(DUALPIPE.ranks[1]) - 1
    with pytest.raises(ScheduleError, match=r"first in, first out; next is W"):
        validate(swap(DUALPIPE, 1, last - 1, last))


def test_weight_gradient_before_its_backward_is_refused():
    actions = [*DUALPIPE.ranks[0]]
    place = next(i for i, action in enumerate(actions) if action.kind is Kind.W)
    with pytest.raises(ScheduleError, match=r"next is none: the queue is empty"):
        validate(swap(DUALPIPE, 0, place - 1, place))


def test_backward_before_forward_is_refused():
    schedule = build_schedule("1f1b", 2, 3)
    with pytest.raises(ScheduleError, match=r"rank 1, B0@1 .*before its forward"):
        validate(swap(schedule, 1, 0, 1))


def test_a_stage_on_the_wrong_rank_is_refused():
    with pytest.raises(ScheduleError, match=r"rank 0, .*stage 0 of direction 1 is held by rank 3"):
        validate(replace_rank(DUALPIPE, 0, [Action(Kind.F, 0, 1, 4), *DUALPIPE.ranks[0]]))


def test_a_microbatch_of_the_other_direction_is_refused():
    with pytest.raises(ScheduleError, match=r"not a microbatch of direction 0"):
        validate(replace_rank(DUALPIPE, 0, [Action(Kind.F, 0, 0, 4), *DUALPIPE.ranks[0]]))


def test_different_order_at_the_ends_of_a_channel_is_refused():
    """Rank 0 runs two forwards in the other order: no dependency is violated, but NCCL would mix the messages
    up."""
    schedule = build_schedule("1f1b", 4, 8)
    broken = swap(schedule, 0, 0, 1)
    simulate(broken)
    with pytest.raises(
        ScheduleError, match=r"activation channel from rank 0 to rank 1: message 0 is sent for"
    ):
        validate(broken)


def test_a_circle_of_waiting_ranks_is_refused():
    schedule = build_schedule("1f1b", 2, 2)
    f0, f1, b0, b1 = (Action(kind, 0, 0, m) for kind in (Kind.F, Kind.B) for m in (0, 1))
    waits_for_itself = replace_rank(schedule, 0, [f0, b0, f1, b1])
    rank_1 = [Action(kind, 1, 0, m) for kind in (Kind.F, Kind.B) for m in (0, 1)]
    broken = replace_rank(waits_for_itself, 1, rank_1)
    with pytest.raises(
        ScheduleError, match=r"cannot finish: rank 0 at B0@0 waits for B0@1; rank 1 at F1@1 waits for"
    ):
        validate(broken)


def test_more_in_flight_than_allowed_is_refused():
    validate(DUALPIPE, max_in_flight=5)
    with pytest.raises(ScheduleError, match="rank 0 holds 5 microbatches in flight, more than 4"):
        validate(DUALPIPE, max_in_flight=4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_ends_of_every_channel_have_the_same_order(name):
    for channel, order in channel_orders(build_schedule(name, 4, 16)).items():
        assert order.sent == order.received
        assert channel.source != channel.destination
        assert len(set(order.sent)) == len(order.sent)


def test_bidirectional_channels_do_not_mix_payloads():
    """Between two neighbours of DualPipe, activations and gradients of the two directions travel the same
    way."""
    orders = channel_orders(DUALPIPE)
    downward = [channel for channel in orders if (channel.source, channel.destination) == (0, 1)]
    assert {channel.payload for channel in downward} == {"activation", "gradient"}
    for channel in downward:
        directions = {message.direction for message in orders[channel].sent}
        assert directions == ({0} if channel.payload == "activation" else {1})


def naive_program(schedule: Schedule) -> list[list[Action | Batch]]:
    """Receives directly before the action that uses them, sends directly after the one that produces them."""
    programs = []
    for actions in schedule.ranks:
        program: list[Action | Batch] = []
        produced: list = []
        for action in actions:
            needed = receives(schedule, action)
            if produced or needed:
                program.append(Batch(tuple(produced), tuple(needed)))
            program.append(action)
            produced = sends(schedule, action)
        if produced:
            program.append(Batch(tuple(produced), ()))
        programs.append(program)
    return programs


def test_blocking_p2p_check_sees_a_deadlock():
    """The naive placement is right for 1F1B and hangs in DualPipe; the placement of `comms` does not."""
    check_blocking(build_schedule("1f1b", 4, 8), naive_program(build_schedule("1f1b", 4, 8)))
    with pytest.raises(ScheduleError, match="deadlock under blocking p2p: rank"):
        check_blocking(DUALPIPE, naive_program(DUALPIPE))
    check_blocking(DUALPIPE, blocking_program(simulate(DUALPIPE)))


def test_blocking_p2p_check_sees_a_missing_or_early_message():
    schedule = build_schedule("1f1b", 2, 2)
    programs = naive_program(schedule)
    with pytest.raises(ScheduleError, match=r"rank 1: F0@1 starts without its activation"):
        check_blocking(schedule, [programs[0], programs[1][1:]])
    early = [[programs[0][1], programs[0][0], *programs[0][2:]], programs[1]]
    with pytest.raises(ScheduleError, match=r"rank 0 sends before it has it: activation for stage 1"):
        check_blocking(schedule, early)


@settings(max_examples=60)
@given(st.data())
def test_no_accepted_reordering_breaks_an_invariant(data):
    """Any two actions of a valid schedule swapped: either refused, or still complete and executable."""
    name = data.draw(st.sampled_from(SCHEDULES))
    schedule = build_schedule(name, 4, 8)
    rank = data.draw(st.integers(0, 3))
    i, j = (data.draw(st.integers(0, len(schedule.ranks[rank]) - 1)) for _ in range(2))
    swapped = swap(schedule, rank, i, j)
    try:
        validate(swapped)
    except ScheduleError:
        return
    parts = [part for action in swapped.ranks[rank] for part in action.parts]
    for index, part in enumerate(parts):
        if part.kind in (Kind.B, Kind.B_INPUT):
            forward = part._replace(kind=Kind.F)
            assert parts.index(forward) < index
    simulate(swapped)
