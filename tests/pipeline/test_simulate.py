"""The event simulation against a longest path over an explicitly written dependency graph."""

import json
import math
import random
import time
from functools import cache

import pytest

from dsv3_megatron.pipeline import SCHEDULES, Costs, Event, Kind, Schedule, build_schedule, simulate
from dsv3_megatron.pipeline.actions import Action, in_flight
from dsv3_megatron.pipeline.show import main as show
from dsv3_megatron.pipeline.trace import chrome_trace, read_trace, write_trace


def longest_path(schedule: Schedule, costs: dict[str, list[float]]) -> dict[tuple[int, int], float]:
    """End time of (rank, slot): the longest path in the graph of program order and data dependencies."""
    slot_of = {
        (part.kind is Kind.F, part.stage, part.microbatch): (rank, slot)
        for rank, actions in enumerate(schedule.ranks)
        for slot, action in enumerate(actions)
        for part in action.parts
        if part.kind is not Kind.W
    }

    @cache
    def end(rank: int, slot: int) -> float:
        action = schedule.ranks[rank][slot]
        start = end(rank, slot - 1) if slot else 0.0
        for part in action.parts:
            stage = part.stage
            if part.kind is Kind.F and stage > 0:
                producer, edge = slot_of[True, stage - 1, part.microbatch], costs["p2p"][stage - 1]
            elif part.kind in (Kind.B, Kind.B_INPUT) and stage < schedule.num_stages - 1:
                producer, edge = slot_of[False, stage + 1, part.microbatch], costs["p2p"][stage]
            else:
                continue
            start = max(start, end(*producer) + (edge if producer[0] != rank else 0))
        stage = action.stage
        if action.backward is not None:
            other = action.backward.stage
            saving = [costs["f"][s] + costs["b"][s] - costs["fb"][s] for s in (stage, other)]
            forward, backward = costs["f"][stage], costs["b"][other]
            length = max(forward + backward - sum(saving) / 2, forward, backward)
            if costs["fb"][stage] == costs["fb"][other]:
                length = costs["fb"][stage]
        elif action.kind is Kind.B_INPUT:
            length = costs["b"][stage] - costs["w"][stage]
        else:
            length = costs[{Kind.F: "f", Kind.B: "b", Kind.W: "w"}[action.kind]][stage]
        return start + length

    for rank, actions in enumerate(schedule.ranks):  # short steps keep the recursion shallow
        for slot in range(len(actions)):
            end(rank, slot)
    return {
        (rank, slot): end(rank, slot) for rank, acts in enumerate(schedule.ranks) for slot in range(len(acts))
    }


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_simulation_is_the_longest_path(name, seed):
    schedule = build_schedule(name, 4, 8)
    rng = random.Random(seed)
    costs = {key: [] for key in ("f", "b", "w", "fb", "p2p")}
    for _ in range(schedule.num_stages):
        f, b = rng.uniform(0.5, 1.5), rng.uniform(1, 3)
        for key, value in zip(
            costs, (f, b, rng.uniform(0, b), rng.uniform(max(f, b), f + b), rng.uniform(0, 1)), strict=True
        ):
            costs[key].append(value)
    expected = longest_path(schedule, costs)
    simulation = simulate(schedule, Costs(**costs))
    slots = [0] * 4
    for event in simulation.events:
        assert event.end == pytest.approx(expected[event.rank, slots[event.rank]])
        slots[event.rank] += 1
    assert simulation.makespan == pytest.approx(max(expected.values()))


def test_p2p_delays_only_edges_between_ranks():
    """DualPipeV on one rank holds both stages: nothing travels. On two ranks, the turn of the V does not
    either."""
    schedule = build_schedule("dualpipev", 1, 4)
    assert simulate(schedule, Costs(p2p=100)).makespan == simulate(schedule).makespan
    schedule = build_schedule("dualpipev", 2, 4)
    first = {str(event.action): event for event in simulate(schedule, Costs(p2p=0.5)).events}
    assert (first["F0@0"].end, first["F0@1"].start) == (1, 1.5)
    assert first["F0@2"].start == first["F0@1"].end


def test_costs_per_stage():
    """Two ranks of 1F1B by hand: the slow second stage sets the pace."""
    schedule = build_schedule("1f1b", 2, 2)
    simulation = simulate(schedule, Costs(f=[1, 2], b=[2, 4], w=[1, 2], fb=[3, 6], p2p=[0.25, 99]))
    # rank 1: F0 1.25–3.25, B0 to 7.25, F1 to 9.25, B1 to 13.25; rank 0: B1 from 13.5 to 15.5
    assert simulation.makespan == 15.5
    assert simulation.bubble == (15.5 - 6, 15.5 - 12)


def test_input_backward_costs_the_full_one_less_the_weights():
    simulation = simulate(build_schedule("dualpipe", 4, 8), Costs(f=1, b=2.5, w=0.75, fb=3))
    for event in simulation.events:
        expected = {Kind.F: 1, Kind.B: 2.5, Kind.B_INPUT: 1.75, Kind.W: 0.75, Kind.PAIR: 3}[event.action.kind]
        assert event.end - event.start == pytest.approx(expected)


def test_a_pair_counts_its_forward_first():
    forward, backward = Action(Kind.F, 0, 0, 1), Action(Kind.B, 0, 0, 0)
    assert list(in_flight([Action(Kind.F, 0, 0, 0), Action.pair(forward, backward)])) == [1, 2, 1]
    assert list(
        in_flight([Action(Kind.F, 0, 0, 0), Action(Kind.B_INPUT, 0, 0, 0), Action(Kind.W, 0, 0, 0)])
    ) == [
        1,
        0,
        0,
    ]


def test_the_step_of_2048_gpus_simulates_in_well_under_a_second():
    start = time.perf_counter()
    simulation = simulate(build_schedule("dualpipe", 16, 120))
    assert time.perf_counter() - start < 0.5
    assert simulation.makespan == 374


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"f": -1}, r"f=-1 is not a duration.*≥ 0"),
        ({"p2p": [0, float("nan")]}, r"p2p=nan is not a duration"),
        ({"b": 1, "w": 1.5}, r"w=1.5 exceeds b=1 .*b = input-only backward \+ w"),
        ({"b": [2, 1], "w": [1, 1.5]}, r"w=1.5 exceeds b=1 \(stage 1\)"),
    ],
)
def test_impossible_costs_are_refused(costs, message):
    with pytest.raises(ValueError, match=message):
        Costs(**costs)


def test_costs_of_another_number_of_stages_are_refused():
    with pytest.raises(ValueError, match="f has 3 entries, but there are 4 stages"):
        simulate(build_schedule("1f1b", 4, 8), Costs(f=[1, 1, 1]))


def test_trace_survives_a_round_trip(tmp_path):
    events = simulate(build_schedule("dualpipe", 4, 8), Costs(f=1.25)).events
    write_trace(
        tmp_path / "trace.json", {"simulated": events, "measured": events[:3]}, microseconds_per_unit=1e6
    )
    back = read_trace(tmp_path / "trace.json")
    assert len(back["measured"]) == 3
    assert [event.action for event in back["simulated"]] == [event.action for event in events]
    for ours, theirs in zip(back["simulated"], events, strict=True):
        assert (ours.rank, ours.start, ours.end) == pytest.approx((theirs.rank, theirs.start, theirs.end))


def test_chrome_trace_has_one_slice_per_action():
    simulation = simulate(build_schedule("dualpipe", 4, 8))
    records = chrome_trace({"simulated": simulation.events}, microseconds_per_unit=1000)["traceEvents"]
    slices = [record for record in records if record["ph"] == "X"]
    assert len(slices) == sum(len(actions) for actions in simulation.schedule.ranks)
    assert max(record["ts"] + record["dur"] for record in slices) == 1000 * simulation.makespan
    assert {record["args"]["name"] for record in records if record["name"] == "thread_name"} == {
        f"rank {rank}" for rank in range(4)
    }


def test_show_writes_pictures_trace_and_text(tmp_path, capsys):
    show(["dualpipe", "--ranks", "4", "--microbatches", "8", "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("  0  F0  F1  F2  f4")
    assert "makespan 26, bubble 2 to 2 (7.7%), peak in flight 5" in out
    # A row of the text spends equal width on equal time: every busy cell of the row, and two units of idle
    # time.
    assert len({len(line.rstrip()) for line in lines[:4]}) == 1
    assert (tmp_path / "dualpipe_4x8.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "dualpipe_4x8.svg").read_text()
    assert "<svg" in svg
    assert svg.count("<path") > 100
    trace = json.loads((tmp_path / "dualpipe_4x8.json").read_text())
    assert len(trace["traceEvents"]) > 60
    show(["--trace", str(tmp_path / "dualpipe_4x8.json"), "--text-only"])
    assert lines[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, says",
    [
        ("", "give either a schedule or --trace FILE"),
        ("dualpip", "invalid choice: 'dualpip'"),
        ("dualpipe --ranks 7", "--ranks 7 is odd"),
        ("dualpipe --ranks many", "argument --ranks: invalid int value"),
        ("dualpipe --microbatches 4", "--microbatches 4 is too few for dualpipe on --ranks 8"),
        ("1f1b --model-chunks 3", "leave --model-chunks out"),
        ("dualpipe --w 5", "--w 5.0 exceeds --b 2"),
        ("dualpipe --f nan", "--f nan is not a duration"),
        ("dualpipe --message inf", "--message inf is not a duration"),
        ("dualpipe --tail nan", "--tail nan is not a duration"),
        ("1f1b --f 0 --b 0 --w 0 --fb 0", "nothing takes time"),
        ("dualpipe --output-dir {file}", "File exists; use another path"),
        ("--trace {folder}/none", "none: No such file"),
        ("--trace {file}", "holds no timelines"),
        ("--trace {file} --ranks 4", "--ranks is for a schedule"),
        ("zb1p --trace {file}", "give either a schedule or --trace FILE"),
        ("zigzag --chunks 3", "error: --chunks 3: the stages"),
        ("zigzag --memory-cap 8", "--memory-cap 8 is too little for zigzag on --ranks 8 with --chunks 2"),
        ("zigzag --memory-cap nan", "--memory-cap nan is no amount"),
        ("zigzag --deferred -1", "--deferred -1.0 is no amount"),
        ("zigzag --alpha 2", "--alpha 2.0: "),
        (
            "dualpipev --memory-cap 9",
            "--memory-cap 9.0: only zigzag deals its weight gradients; leave --memory-cap out",
        ),
        ("dualpipev --chunks 2", "leave --chunks out"),
        ("zigzag --costs {folder}/none", "none: No such file or directory; use"),
        ("zigzag --costs {file}", "file: it needs the entries f, b, w and fb"),
        ("zigzag --costs {file} --f 2", "--f would do nothing beside --costs"),
    ],
)
def test_show_refuses_in_one_line_and_draws_nothing(line, says, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text('{"traceEvents": [], "microsecondsPerUnit": 1}')
    with pytest.raises(SystemExit, match="2"):
        show(line.format(file=file, folder=tmp_path).split())
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert says in said.err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("schedule", ["zigzag", "dualpipev"])
def test_show_says_of_a_file_of_costs_what_is_wrong_in_it(schedule, tmp_path, capsys):
    costs = {"f": 1, "b": 2, "w": 1, "fb": 3}
    file = tmp_path / "costs.json"
    for change, says in (
        ({"f": [1, 2, 3]}, "f has 3 entries, but there are 4 stages"),
        ({"f": -1}, "f=-1.0 is not a duration"),
        ({"f": [1, math.nan, 1, 1]}, "f=nan is not a duration"),
        ({"f": "1"}, 'f holds "1", which is no number'),
        ({"w": True}, "w holds true, which is no number"),
        (dict.fromkeys(costs, 0), "nothing takes time in it"),
        ({name: [0, 0, 0, 0] for name in costs}, "nothing takes time in it"),
        ({"p2": 1}, "it needs the entries f, b, w and fb, and may have p2p and no other"),
    ):
        file.write_text(json.dumps(costs | change))
        with pytest.raises(SystemExit, match="2"):
            show([schedule, "--ranks", "2", "--microbatches", "4", "--costs", str(file)])
        said = capsys.readouterr()
        assert not said.out and said.err.startswith(f"error: --costs {file}: {says}"), said.err
        assert said.err.count("\n") == 1
    file.write_text(json.dumps(costs | {"f": [1, 0, 1, 1]}))  # a stage without layers
    show([schedule, "--ranks", "2", "--microbatches", "4", "--costs", str(file), "--text-only"])
    assert "makespan" in capsys.readouterr().out


def test_events_have_the_documented_fields():
    assert Event._fields == ("rank", "start", "end", "action")
