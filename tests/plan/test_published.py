"""The error table: DeepSeek's own training within the fit, other people's runs within the target."""

from dataclasses import replace

import pytest

from dsv3_megatron.plan import deepseek, report
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.calibration import fit_imbalance, fit_sustained, fit_trace, trace_times
from dsv3_megatron.plan.confidence import DEEPSEEK, Domain, confidence, is_near
from dsv3_megatron.plan.cost import report_totals
from dsv3_megatron.plan.errors import MEMORY_PERCENT, RAN_PERCENT, TIME_PERCENT
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.published import RUNS
from dsv3_megatron.plan.step import plan
from dsv3_megatron.studies import planner_error as bench

H800 = GPUS["h800"]


def test_deepseeks_own_training() -> None:
    rows = {(row.what, row.unit): row for row in bench.deepseek_rows()}
    for what in (("step", "s"), ("tokens/s/GPU", ""), ("1T tokens", "K GPU-hours"), ("1T tokens", "days")):
        assert abs(rows[what].error) < 0.05, rows[what]
    assert abs(rows["pair of 4 MoE layers in the trace", "ms"].error) < 0.01
    # Not fitted: the unit times of rank 0 other than W, its bubble, the optimizer.
    for what in (("mean F of rank 0", "ms"), ("mean I of rank 0", "ms"), ("mean F&B of rank 0", "ms")):
        assert abs(rows[what].error) < 0.15, rows[what]
    assert abs(rows["bubble of rank 0", "s"].error) < 0.10


def test_the_table_holds_what_the_fits_give() -> None:
    table, fitted = H800.achieved, fit_trace(H800)
    for name in (
        "fp8_gemm",
        "attention_forward",
        "attention_backward",
        "beside_token",
        "beside_ib",
        "pair_gap",
    ):
        assert getattr(table, name) == pytest.approx(getattr(fitted, name), rel=0.01), name
    assert H800.sustained == pytest.approx(fit_sustained(H800), abs=0.01)
    assert pytest.approx(fit_imbalance(H800), abs=0.01) == LOAD_IMBALANCE


def test_every_operator_of_the_trace_is_near() -> None:
    published = deepseek.TRACE_COMPUTE | deepseek.TRACE_COMMUNICATION
    times = trace_times(H800)
    for name, ms in published.items():
        assert times[name] == pytest.approx(ms, rel=0.15), name


@pytest.fixture(scope="module")
def judged() -> list[bench.Judged]:
    return bench.judged()


def test_other_published_runs(judged: list[bench.Judged]) -> None:
    """Each half within its limit; of what was opened once as much as docs/plan.md says."""
    half = {name: [row for row in judged if row.run.half == name] for name in bench.HALVES}
    assert len(half["fitted"]) == 12 and len(half["judge"]) == 32 and len(half["opened"]) == 54
    assert {row.run.gpu for row in half["judge"]} == {"h100", "b200", "b300", "gb200", "gb300"}
    for name in ("fitted", "judge"):
        limit = bench.HALVES[name][1]
        assert not [row.run.name for row in half[name] if abs(row.time.error) > limit]
    near = [row for row in half["opened"] if bench.inside(row, judged)]
    assert len(near) == 26 and sum(abs(row.time.error) <= 0.15 for row in near) == 24
    far = [row for row in half["opened"] if row not in near]
    assert sum(abs(row.time.error) <= 0.15 for row in far) == 15
    text = bench.halves(judged)
    assert "Fitted half: 12 of 12" in text.split("Judges: not fitted:")[0]
    assert "inside of a domain: 24 of 26 within 15%" in text and "outside of every domain: 15 of 28" in text
    assert all(f"| {row.run.name} |" in text for row in judged)


def test_errors_are_those_of_the_planner(judged: list[bench.Judged]) -> None:
    """What `confidence` says comes from this table; a run of it that changes must be written anew."""
    compared = {row.run.name: row for row in judged}
    for name, row in list(compared.items()):
        if row.run.half == "apart" or not row.run.job.software.fused_attention:
            assert name not in TIME_PERCENT
            del compared[name]
    assert set(TIME_PERCENT) - {DEEPSEEK} == set(compared)
    for name, row in compared.items():
        said = TIME_PERCENT[name]
        assert said.percent == pytest.approx(100 * row.time.error, abs=0.15), name
        assert Domain(*said.domain) == row.domain
        assert is_near(row.run.job, said) and said.num_gpus == row.run.job.layout.num_gpus
    for row in judged:
        if row.memory:
            worst = max((one.error for one in row.memory), key=abs)
            assert MEMORY_PERCENT[row.run.name] == pytest.approx(100 * worst, abs=0.15), row.run.name


def test_no_run_that_ran_is_said_not_to_fit(judged: list[bench.Judged]) -> None:
    assert dict(bench.above_memory(judged)) == pytest.approx(RAN_PERCENT, abs=0.15)
    plans = [plan(run.job, GPUS[run.gpu], run.counts) for run in RUNS]
    assert not [p for p in plans if report.verdict(p) == "does not fit"]


def test_tensors_of_published_peaks(judged: list[bench.Judged]) -> None:
    """None was fitted, twelve had never been seen: what PyTorch calls allocated."""
    tensors = [one for row in judged for one in row.memory if one.kind == "tensors"]
    assert len(tensors) == 21 and all(abs(one.error) < 0.02 for one in tensors)
    device = [one for row in judged for one in row.memory if one.kind == "device"]
    assert len(device) == 2 and all(-0.15 < one.error < 0 for one in device)


def test_confidence_is_the_largest_error_of_its_domain() -> None:
    job = next(run.job for run in RUNS if run.gpu == "gb200" and run.job.precision.recipe == "mxfp8")
    job = replace(job, dispatcher="flex", flex_backend="deepep")
    inside = confidence(job, GPUS["gb200"])
    own = [run.percent for run in TIME_PERCENT.values() if run.domain == ("gb200", "deepep", "mxfp8")]
    assert inside.domain and len(inside.compared_with) == len(own)
    assert max(map(abs, own)) <= inside.time_percent <= max(map(abs, own)) + 1
    for other, gpu in (
        (job, "h20"),
        (replace(job, precision=replace(job.precision, recipe="nvfp4")), "gb200"),
        (replace(job, dispatcher="two_hop"), "gb200"),
        (replace(job, offload_optimizer=0.5), "gb200"),
    ):
        outside = confidence(other, GPUS[gpu])
        assert not outside.domain and outside.unlike and outside.time_percent >= inside.time_percent
        assert "outside of every domain" in str(outside)
    assert confidence(deepseek.JOB, H800).as_dict()["domain"] is True


def test_a_domain_has_sizes() -> None:
    """Only runs of a job's size are compared with it: the steps of 8192 GPUs say nothing of 256, nor the other way."""
    whole = next(
        run for run in RUNS if "one graph" in run.name and run.gpu == "gb200" and run.half == "fitted"
    )
    gpu = GPUS["gb200"]
    here = confidence(whole.job, gpu)
    assert here.domain and not any(name.startswith("8192") for name in here.compared_with)
    assert here.time_percent <= 15
    many = next(run for run in RUNS if run.name.startswith("8192 GB200"))
    there = confidence(many.job, gpu)
    assert there.domain and there.time_percent >= 35 and whole.name not in there.compared_with
    narrow = replace(whole.job, sizes=replace(whole.job.sizes, hidden_size=2048))
    few = replace(whole.job, global_batch_size=whole.job.global_batch_size // 32)
    huge = replace(
        whole.job, layout=replace(whole.job.layout, num_gpus=256 * 256), global_batch_size=4096 * 256
    )
    for other, said in ((narrow, "hidden size 2,048"), (few, "microbatches 2,"), (huge, "GPUs 65,536")):
        outside = confidence(other, gpu)
        assert not outside.domain and any(said in why for why in outside.unlike), outside.unlike


def test_tight_is_where_the_error_decides() -> None:
    result = plan(deepseek.JOB, H800, deepseek.COUNTS)
    peak = max(result.memory_gib)
    for share, said in ((2.0, "fits"), (1.02, "tight"), (0.99, "tight"), (0.5, "does not fit")):
        other = replace(result, gpu=replace(H800, memory=share * peak * 2**30))
        assert report.verdict(other) == said and other.fits == (share > 1)
        assert other.memory_margin_gib == pytest.approx((share - 1) * peak)


def test_all_to_all_alone_grows_with_expert_parallelism_as_published() -> None:
    for row in bench.all_to_all_rows():
        limit = 0.25 if row.what.startswith("h100 EP16") else 0.12  # two nodes are predicted too short
        assert abs(row.error) < limit, row


def test_the_parts_of_the_step_are_named_and_add_up() -> None:
    parts = bench.steps_towards_the_whole()
    assert parts[0][1] == pytest.approx(17.2, abs=0.3)  # uniform stages, free messages: the trace alone
    assert parts[-1][1] == pytest.approx(deepseek.STEP_S, rel=0.05)


def test_the_reports_totals() -> None:
    totals = {phase: (hours, money) for phase, hours, money in report_totals(deepseek.GPU_HOURS_PER_1T)}
    assert totals["pre-training"][0] == pytest.approx(2664)
    assert totals["total"] == pytest.approx((2788, 5.576), rel=1e-3)


@pytest.mark.slow
def test_one_published_run_anchors_another(judged: list[bench.Judged]) -> None:
    """All whose plan is far off come nearer, and all together."""
    rows = bench.anchored_rows(judged)
    assert len(rows) == 43
    far = [(row.time.error, error) for _, row, error in rows if abs(row.time.error) > 0.10]
    assert len(far) == 10 and all(abs(after) < abs(before) for before, after in far)
    before = sum(abs(row.time.error) for _, row, _ in rows)
    assert sum(abs(error) for _, _, error in rows) < 0.5 * before
