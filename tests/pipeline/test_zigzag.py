"""Zigzag: the published check values, its bound, its cap, and that every size builds or is refused by name."""

from typing import Any

import pytest

from dsv3_megatron.pipeline import Budget, Costs, build_schedule, simulate, validate, zigzag_lower_bound
from dsv3_megatron.pipeline.actions import Kind
from dsv3_megatron.pipeline.show import main as show
from dsv3_megatron.pipeline.zigzag import slots_order, v_order, zigzag_placement

UNIT = Costs(f=1, b=2, w=1, fb=3)
WHOLE = Costs(f=49, b=107, w=32, fb=144)  # a sixteenth of DeepSeek-V3, in ms
HALF = Costs(f=24.5, b=53.5, w=16, fb=72)


@pytest.mark.parametrize(
    "ranks, chunks, microbatches, costs, cap, deferred, makespan, over_bound",
    [
        (8, 2, 20, UNIT, 18, 1.0, 127, 1.0),
        (8, 4, 24, UNIT, 34, 1.0, 295, 1.0),
        (8, 2, 60, WHOLE, 17, 1.8, 18254, 1.002),
        pytest.param(8, 4, 60, HALF, 34, 1.8, 18154, 1.026, marks=pytest.mark.slow),
        pytest.param(8, 4, 64, HALF, 34, 1.8, 18953, 1.0055, marks=pytest.mark.slow),
        (8, 4, 16, HALF, 34, 1.8, 5129, 1.022),
        pytest.param(16, 2, 120, HALF, 34, 1.8, 18322.5, 1.002, marks=pytest.mark.slow),
    ],
)
def test_check_values(ranks, chunks, microbatches, costs, cap, deferred, makespan, over_bound) -> None:
    options = {"chunks": chunks, "costs": costs, "memory_cap": cap, "deferred": deferred}
    table = build_schedule("zigzag", ranks, microbatches, **options)
    assert simulate(table, costs).makespan == makespan
    # A bound of ours must not be beaten, and the distance is the one that was published.
    bound = zigzag_lower_bound(ranks, microbatches, chunks, costs, cap, deferred)
    assert bound <= makespan <= bound * over_bound
    assert max(Budget(cap, deferred).peaks(table.ranks, table.num_stages)) <= cap * (1 + 1e-12)
    # The same again is the same object's contents, not a second search.
    assert build_schedule("zigzag", ranks, microbatches, **options).ranks is table.ranks


def test_defaults_are_those_of_unit_costs() -> None:
    assert simulate(build_schedule("zigzag", 8, 20), UNIT).makespan == 127


SIZES = [
    (ranks, chunks, microbatches)
    for ranks, chunks in ((2, 2), (2, 4), (3, 4), (5, 2), (8, 2))
    for microbatches in (1, ranks - 1, 2 * ranks - 1, 2 * ranks + 3)
]


def check(ranks: int, chunks: int, microbatches: int) -> None:
    table = build_schedule("zigzag", ranks, microbatches, chunks=chunks)
    peaks = validate(table).peak_in_flight  # the model of NCCL is part of it
    assert max(peaks) <= chunks * ranks + 1
    bound = zigzag_lower_bound(ranks, microbatches, chunks)
    assert bound <= simulate(table, UNIT).makespan
    assert max(Budget(0).peaks(table.ranks, table.num_stages)) <= chunks * ranks + 2


@pytest.mark.parametrize("ranks, chunks, microbatches", SIZES)
def test_any_size_is_a_correct_schedule(ranks, chunks, microbatches) -> None:
    check(ranks, chunks, microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", range(2, 17))
def test_grid_of_sizes(ranks) -> None:
    for chunks in (2, 4, 6):
        for microbatches in range(1, 4 * ranks + 1, 1 if ranks < 6 else ranks - 1):
            check(ranks, chunks, microbatches)


@pytest.mark.parametrize("deferred", [0.5, 1.8, (2.5,) * 3 + (0.4,) * 3])
@pytest.mark.parametrize("cap", [7, 7.5, 9])
def test_the_cap_is_never_passed(cap, deferred) -> None:
    """Uneven stages too: memory by stage, costs by stage, messages that take time."""
    costs = Costs(f=(3, 1, 1, 2, 1, 1), b=(4, 2, 2, 3, 2, 5), w=(1, 1, 0.5, 1, 1, 2), fb=4, p2p=0.25)
    table = build_schedule("zigzag", 3, 9, costs=costs, memory_cap=cap, deferred=deferred)
    validate(table)
    assert max(Budget(cap, deferred).peaks(table.ranks, 6)) <= cap * (1 + 1e-12)  # sums of 1.8
    bound = zigzag_lower_bound(3, 9, 2, costs, cap, deferred)
    assert bound <= simulate(table, costs).makespan
    # What was dealt by a clock is what the simulator says of the table: no rank waits where it was not foreseen.
    # And it is never longer under these times than what is dealt by even ones.
    free = build_schedule("zigzag", 3, 9, costs=UNIT, memory_cap=cap, deferred=deferred)
    assert simulate(table, costs).makespan <= simulate(free, costs).makespan


def test_the_cap_decides() -> None:
    """More memory is never slower, and weight gradients wait only where they may."""
    tables = [build_schedule("zigzag", 4, 16, memory_cap=cap, deferred=1.8) for cap in (9, 11, 20)]
    steps = [simulate(table, UNIT).makespan for table in tables]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]
    nothing_waits = build_schedule("zigzag", 4, 16, memory_cap=9, deferred=9.5)
    assert max(validate(nothing_waits).peak_weight_queue) == 0


def test_no_pair_is_of_one_microbatch_and_stages_run_down_and_up() -> None:
    orders = [(2, v_order(4, 9, 0.6)), (2, slots_order(4, 9, 2, 0.6, 0)), (6, slots_order(4, 9, 6, 0.6, 1))]
    for chunks, order in orders:
        for rank, actions in enumerate(order):
            assert all(zigzag_placement(4, chunks)[action.stage] == rank for action in actions)
            for action in actions:
                if action.backward is not None:
                    assert action.microbatch != action.backward.microbatch
                    assert action.backward.kind is Kind.B


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_ranks": 1}, "num_ranks=1"),
        ({"chunks": 3}, "chunks=3"),
        ({"chunks": 0}, "chunks=0"),
        ({"memory_cap": 8}, "memory_cap=8"),
        ({"memory_cap": -1}, "memory_cap=-1"),
        ({"memory_cap": float("nan")}, "memory_cap=nan is no amount of memory; use a finite"),
        ({"deferred": -1.0}, "deferred=-1"),
        ({"deferred": (1.0, 2.0)}, "deferred has 2 entries"),
        ({"costs": Costs(f=(1, 2, 3))}, "f has 3 entries"),
        ({"costs": "nowhere.json"}, "costs=nowhere.json"),
        ({"alpha": 2}, "alpha=2"),
        ({"num_model_chunks": 2}, "num_model_chunks=2"),
    ],
)
def test_refusals(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        build_schedule("zigzag", **{"num_ranks": 4, "num_microbatches": 12} | arguments)


@pytest.mark.parametrize("option", ["chunks", "costs", "memory_cap", "deferred", "alpha"])
def test_other_schedules_take_none_of_it(option) -> None:
    given: dict[str, Any] = {option: 1}
    with pytest.raises(ValueError, match=f"{option}=1"):
        build_schedule("dualpipev", 4, 12, **given)


def test_show_prints_the_ratio(capsys, tmp_path) -> None:
    show(["zigzag", "--ranks", "2", "--microbatches", "4", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "makespan 25" in printed and "lower bound 25, ratio 1.0000; peak memory 6 of 6 chunks" in printed
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".svg"]
