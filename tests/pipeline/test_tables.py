"""Golden values of the schedules (DeepSeek-V3 report §3.2.1 and the published DualPipe tables)."""

from collections import Counter
from types import SimpleNamespace

import pytest

from dsv3_megatron.pipeline import Action, Kind, Schedule, build_schedule, simulate, validate


def streams(schedule: Schedule, rank: int) -> list[str]:
    """A rank's program in the notation of the eight steps: kind and stream, stream 0 being the one it starts
    with."""
    first = schedule.ranks[rank][0]

    def name(part: Action) -> str:
        return f"{part.kind.value}{int((part.stage, part.direction) != (first.stage, first.direction))}"

    return ["&".join(name(part) for part in action.parts) for action in schedule.ranks[rank]]


RANK_0 = (  # PP8, 20 microbatches: [6, 1, 3, 3, 3, 1, 3, 1] times the eight steps
    ["F0"] * 6
    + ["F0", "F1"]
    + ["I1", "W1", "F1"] * 3
    + ["F0&B1", "F1&B0"] * 3
    + ["B1", "F1&B0"] * 3
    + ["B1", "I0"]
    + ["W0", "I0"] * 3
    + ["W0"]
)
RANK_3 = (  # [0, 4, 0, 6, 0, 4, 0, 4], the first pair of a middle rank not overlapped
    ["F0", "F1"] * 4
    + ["F0", "B1", "F1&B0"]
    + ["F0&B1", "F1&B0"] * 5
    + ["B1", "B0"] * 2
    + ["I1", "I0"] * 2
    + ["W1", "W0"] * 2
)


def test_programs_of_the_report_figure():
    schedule = build_schedule("dualpipe", 8, 20)
    assert streams(schedule, 0) == RANK_0
    assert streams(schedule, 3) == RANK_3


def test_input_only_switch_on_even_and_odd_ranks():
    """Step 6 turns input-only from iteration (r+1)//2 on: before its B1 for odd r, after it for even r."""
    schedule = build_schedule("dualpipe", 8, 20)
    for r in range(4):
        backward = [name for name in streams(schedule, r) if name in {"B0", "B1", "I0", "I1"}]
        # Without steps 3 and 5, and without the first main step of a middle rank, which is not overlapped.
        step_6 = backward[2 * (3 - r) + (r == 3) :][: 2 * (r + 1)]
        expected = []
        input_only = False
        for i in range(r + 1):
            input_only = input_only or (i == (r + 1) // 2 and r % 2 == 1)
            expected.append("I1" if input_only else "B1")
            input_only = input_only or (i == (r + 1) // 2 and r % 2 == 0)
            expected.append("I0" if input_only else "B0")
        assert step_6 == expected


def test_counts_of_rank_0_in_the_2048_gpu_run():
    """PP16 × 120 microbatches on rank 0, as Table 4 of arXiv 2505.09343 is read."""
    counts = Counter(action.kind for action in build_schedule("dualpipe", 16, 120).ranks[0])
    assert counts == {Kind.F: 23, Kind.B: 8, Kind.B_INPUT: 15, Kind.W: 15, Kind.PAIR: 97}


@pytest.mark.parametrize(("num_ranks", "bubble"), [(2, 0), (4, 2), (8, 6), (16, 14)])
def test_dualpipe_bubble_and_memory_on_every_rank(num_ranks, bubble):
    for num_microbatches in range(2 * num_ranks, 8 * num_ranks + 1, max(2, num_ranks // 2)):
        simulation = simulate(build_schedule("dualpipe", num_ranks, num_microbatches))
        assert simulation.bubble == (bubble,) * num_ranks, num_microbatches
        assert simulation.peak_in_flight == (num_ranks + 1,) * num_ranks, num_microbatches


def test_dualpipe_makespan_of_the_report_figure():
    assert simulate(build_schedule("dualpipe", 8, 20)).makespan == 66


@pytest.mark.parametrize(("num_ranks", "bubble"), [(1, 0), (2, 2), (3, 4), (4, 6), (8, 14)])
def test_dualpipev_bubble_and_memory_on_every_rank(num_ranks, bubble):
    """P ranks are 2P stages: the formulas of the table with PP = 2P."""
    for num_microbatches in range(2 * num_ranks, 8 * num_ranks + 1):
        simulation = simulate(build_schedule("dualpipev", num_ranks, num_microbatches))
        assert simulation.bubble == (bubble,) * num_ranks, num_microbatches
        assert simulation.peak_in_flight == (2 * num_ranks + 1,) * num_ranks, num_microbatches


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
def test_dualpipev_is_dualpipe_folded_in_the_middle(num_ranks):
    """Rank r of DualPipeV runs the program of rank r of DualPipe on twice the ranks and twice the
    microbatches."""
    folded = build_schedule("dualpipev", num_ranks, 4 * num_ranks)
    unfolded = build_schedule("dualpipe", 2 * num_ranks, 8 * num_ranks)
    for rank in range(num_ranks):
        assert streams(folded, rank) == streams(unfolded, rank)


def test_dualpipe_mirrored_ranks_run_the_same_program():
    schedule = build_schedule("dualpipe", 8, 20)
    for rank in range(4):
        assert streams(schedule, rank) == streams(schedule, 7 - rank)


def test_dualpipe_placement():
    schedule = build_schedule("dualpipe", 8, 20)
    assert [schedule.stages_of(rank) for rank in (0, 2, 7)] == [
        ((0, 0), (7, 1)),
        ((2, 0), (5, 1)),
        ((0, 1), (7, 0)),
    ]
    assert schedule.microbatches_of(0) == range(10)
    assert schedule.microbatches_of(1) == range(10, 20)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_1f1b_and_zb1p_bubble_and_memory(num_ranks):
    f, b, w = 1, 2, 1
    for num_microbatches in range(num_ranks, 5 * num_ranks):
        plain = simulate(build_schedule("1f1b", num_ranks, num_microbatches))
        zero_bubble = simulate(build_schedule("zb1p", num_ranks, num_microbatches))
        assert plain.bubble == ((num_ranks - 1) * (f + b),) * num_ranks
        assert zero_bubble.bubble == ((num_ranks - 1) * (f + b - 2 * w),) * num_ranks
        assert plain.peak_in_flight == zero_bubble.peak_in_flight == tuple(range(num_ranks, 0, -1))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_model_chunks", [2, 3])
@pytest.mark.parametrize(("group", "num_microbatches"), [(4, 16), (4, 8), (5, 9)])
def test_interleaved_order_is_megatrons(num_ranks, num_model_chunks, group, num_microbatches):
    """Against the tables that Megatron's own interleaved schedule computes."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(num_microbatches, num_model_chunks, group)
    schedule = build_schedule(
        "interleaved_1f1b_overlap",
        num_ranks,
        num_microbatches,
        num_model_chunks=num_model_chunks,
        microbatch_group_size=group,
    )
    for rank in range(num_ranks):
        pp_group = SimpleNamespace(size=lambda: num_ranks, rank=lambda rank=rank: rank)
        communicator = SimpleNamespace(
            pp_group=pp_group, virtual_pipeline_model_parallel_size=num_model_chunks
        )
        _, _, num_warmup, num_pairs = schedules.get_pp_rank_microbatches(
            num_microbatches, num_model_chunks, group, False, True, communicator
        )
        actions = schedule.ranks[rank]
        assert [action.kind for action in actions] == (
            [Kind.F] * num_warmup + [Kind.PAIR] * num_pairs + [Kind.B] * num_warmup
        )
        parts = [part for action in actions for part in action.parts]
        forward = [(p.microbatch, p.stage) for p in parts if p.kind is Kind.F]
        backward = [(p.microbatch, p.stage) for p in parts if p.kind is Kind.B]
        assert forward == [(m, chunk * num_ranks + rank) for m, chunk in table]
        assert backward == [(m, (num_model_chunks - 1 - chunk) * num_ranks + rank) for m, chunk in table]


def test_forward_only_keeps_the_order_of_the_forwards():
    schedule = build_schedule("dualpipe", 4, 8)
    evaluation = schedule.forward_only()
    for rank in range(4):
        kept = [part for action in schedule.ranks[rank] for part in action.parts if part.kind is Kind.F]
        assert list(evaluation.ranks[rank]) == kept
    assert simulate(evaluation).makespan < simulate(schedule).makespan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gpipe", "num_ranks": 4, "num_microbatches": 8}, r"name='gpipe'.*use one of 1f1b"),
        ({"name": "dualpipe", "num_ranks": 7, "num_microbatches": 20}, r"num_ranks=7 is odd.*use 6 or 8"),
        ({"name": "dualpipe", "num_ranks": 1, "num_microbatches": 20}, r"num_ranks=1 is odd.*use 2 or 2"),
        (
            {"name": "dualpipe", "num_ranks": 8, "num_microbatches": 14},
            r"num_microbatches=14 is too few.*at least 16",
        ),
        ({"name": "dualpipe", "num_ranks": 8, "num_microbatches": 21}, r"num_microbatches=21 is odd.*use 22"),
        (
            {"name": "dualpipev", "num_ranks": 4, "num_microbatches": 7},
            r"num_microbatches=7 is too few.*at least 8",
        ),
        ({"name": "1f1b", "num_ranks": 0, "num_microbatches": 7}, r"num_ranks=0.*positive"),
        (
            {"name": "1f1b", "num_ranks": 4, "num_microbatches": 2.0},
            r"num_microbatches=2.0.*positive integer",
        ),
        (
            {"name": "dualpipe", "num_ranks": 4, "num_microbatches": 8, "num_model_chunks": 2},
            r"num_model_chunks=2.*leave",
        ),
        (
            {"name": "interleaved_1f1b_overlap", "num_ranks": 1, "num_microbatches": 8},
            r"num_ranks=1.*at least 2",
        ),
        (
            {"name": "interleaved_1f1b_overlap", "num_ranks": 4, "num_microbatches": 3},
            r"microbatch_group_size=4 must lie between num_ranks=4 and num_microbatches=3",
        ),
        (
            {"name": "interleaved_1f1b_overlap", "num_ranks": 4, "num_microbatches": 9},
            r"last group of 1.*multiple of",
        ),
    ],
)
def test_impossible_sizes_name_argument_value_and_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(**arguments)


@pytest.mark.parametrize("name", ["1f1b", "zb1p"])
def test_fewer_microbatches_than_ranks_are_allowed_where_they_work(name):
    validate(build_schedule(name, 8, 3))
