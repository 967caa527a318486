"""`--profile-pipeline`: the measured timeline of a step, through the real trainer."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from dsv3_megatron.dualpipe.shared_costs import shared_costs
from dsv3_megatron.pipeline import Costs, build_schedule, simulate, validate
from dsv3_megatron.pipeline.actions import Kind
from dsv3_megatron.pipeline.fit import fit_costs, fit_stage_costs, read_costs, write_costs
from dsv3_megatron.pipeline.nominal import nominal_options
from dsv3_megatron.pipeline.trace import read_trace
from tests.arguments.lines import MICRO
from tests.harness import run_distributed
from tests.parallel.test_resume import train

WORDS = ["--spec", "dsv3", "--device", "cpu", *MICRO, "--pipeline-model-parallel-size", "2"]


@pytest.mark.parametrize(
    "schedule, ep, world_size, microbatches",
    [
        ("dualpipe", 2, 4, 4),
        pytest.param("dualpipev", 1, 2, 8, marks=pytest.mark.slow),
        ("zb1p", 1, 2, 8),
        pytest.param("zigzag", 1, 2, 8, marks=pytest.mark.slow),
    ],
)
def test_measured_timeline(schedule: str, ep: int, world_size: int, microbatches: int, tmp_path) -> None:
    words = ["--pipeline-schedule", schedule, "--expert-model-parallel-size", str(ep)]
    words += ["--profile-pipeline", "2", "--profile-pipeline-dir", str(tmp_path)]
    if ep == 2:
        words += ["--pipeline-pair-order", "report"]
    run_distributed(train, world_size=world_size, timeout=120, init=False, words=[*WORDS, *words])
    assert (tmp_path / "pipeline_step2.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "pipeline_step2.svg").read_text()[:2000]
    assert (tmp_path / "pipeline_step2_pairs.png").exists() == (ep == 2)
    if ep == 2:
        check_overlap(json.loads((tmp_path / "pipeline_step2.json").read_text())["traceEvents"])
    timelines = read_trace(tmp_path / "pipeline_step2.json")
    options = nominal_options(2) if schedule == "zigzag" else {}
    table = build_schedule(schedule, 2, microbatches, **options)
    # What was measured of four stages is what a zigzag of four can be dealt by.
    measured = tmp_path / "pipeline_step2_costs.json"
    costs = read_costs(measured)
    assert len(costs.per_stage("f", table.num_stages)) == table.num_stages
    if table.num_stages == 4:
        validate(build_schedule("zigzag", 2, microbatches, costs=measured))
    else:
        with pytest.raises(ValueError, match="has 2 entries, but there are 4 stages"):
            build_schedule("zigzag", 2, microbatches, costs=measured)
    for name in ("measured", "simulated"):
        check_timeline(timelines[name], table)
    # The simulated one is the same table with durations taken from the measured one.
    costs = fit_costs(timelines["measured"])
    assert [e.start for e in timelines["simulated"]] == pytest.approx(
        [e.start for e in simulate(table, costs).events], abs=1e-5
    )
    assert 0.3 < timelines["measured"][-1].end / timelines["simulated"][-1].end < 10


def check_overlap(records: list[dict]) -> None:
    """On each rank some of the all-to-all of its pairs was under way while the rank computed."""
    lanes = {
        (record["pid"], record["tid"]): record["args"]["name"]
        for record in records
        if record["name"] == "thread_name"
    }
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        if record.get("cat") == "span":
            lane = lanes[record["pid"], record["tid"]]
            spans[lane].append((record["ts"], record["ts"] + record["dur"]))
    assert sorted(spans) == [
        f"rank {rank}: {lane}" for rank in (0, 1) for lane in ("communication", "compute")
    ]
    for rank in (0, 1):
        computing, communicating = spans[f"rank {rank}: compute"], spans[f"rank {rank}: communication"]
        together = sum(
            max(0.0, min(end, other_end) - max(start, other))
            for start, end in communicating
            for other, other_end in computing
        )
        assert together > 0


def check_timeline(events, table) -> None:
    """Every rank ran its actions in the table's order, one at a time, and none before what it needs had begun."""
    by_rank = defaultdict(list)
    begun = {}
    for event in events:
        by_rank[event.rank].append(event)
        assert event.start < event.end
        for part in event.action.parts:
            begun[part.kind, part.stage, part.microbatch] = event.start
    for rank, actions in enumerate(table.ranks):
        assert [event.action for event in by_rank[rank]] == list(actions)
        for before, after in zip(by_rank[rank], by_rank[rank][1:], strict=False):
            assert before.end <= after.start + 1e-6
    forwards = [key for key in begun if key[0] is Kind.F and key[1] > 0]
    assert forwards
    for kind, stage, microbatch in forwards:
        assert begun[kind, stage - 1, microbatch] < begun[kind, stage, microbatch]


def test_fitted_costs_of_a_simulated_step_are_its_costs() -> None:
    costs = Costs(f=3, b=7, w=2, fb=8)
    table = build_schedule("dualpipe", 4, 12)
    assert fit_costs(simulate(table, costs).events) == costs


def test_fitted_costs_by_stage_are_those_of_the_stages(tmp_path) -> None:
    """Uneven stages, measured by a simulation, to a file and back: pairs of two stages take what they took."""
    f, w, saved = (3.0, 2.0, 4.0, 1.0, 2.5, 3.5), (1.0, 1.5, 2.0, 0.5, 1.0, 2.0), 0.75
    b = tuple(2 * x for x in f)
    costs = Costs(f=f, b=b, w=w, fb=tuple(x + y - saved for x, y in zip(f, b, strict=True)))
    table = build_schedule("zigzag", 3, 12, costs=costs)
    fitted = fit_stage_costs(simulate(table, costs).events, 6)
    assert fitted.f == f and fitted.w == w and fitted.b == pytest.approx(b)
    assert fitted.fb == pytest.approx(costs.fb)
    write_costs(tmp_path / "costs.json", fitted)
    again = build_schedule("zigzag", 3, 12, costs=tmp_path / "costs.json")
    assert again.ranks == table.ranks
    with pytest.raises(ValueError, match="no forward alone"):
        fit_stage_costs([], 6)


def _read(rank: int, world_size: int, folder: Path, different: str) -> Costs | str:
    (folder / f"{rank}.json").write_text(json.dumps({"f": 1, "b": 2, "w": 1, "fb": [3, 3, 3, 3]}))
    if rank == 1 and different:
        (folder / "1.json").write_text(different)
    try:
        return shared_costs(folder / f"{rank}.json", 4)
    except ValueError as error:
        return str(error)


def test_ranks_that_read_different_costs_stop_all_together(tmp_path) -> None:
    """Tables of different times would exchange wrong messages."""
    for different, says in (
        ("", None),
        ('{"f": 1.5, "b": 2, "w": 1, "fb": 3}', "rank 1 reads other times in it than rank 0"),
        ("{}", "on rank 1: costs="),
    ):
        read = run_distributed(_read, world_size=2, folder=tmp_path, different=different)
        if says is None:
            assert read == [Costs(f=1.0, b=2.0, w=1.0, fb=(3.0,) * 4)] * 2
        else:
            assert all(says in text for text in read), read


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"f": 1, "b": 2, "w": 3, "fb": 3}', '{"f": "x"}'])
def test_what_is_no_file_of_costs_is_refused(text, tmp_path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"costs\.json: .*; use the pipeline_stepN_costs\.json"):
        build_schedule("zigzag", 2, 8, costs=path)
