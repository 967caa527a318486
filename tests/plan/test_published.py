"""The error table: DeepSeek's own training within the fit, other people's runs within the target."""

import pytest

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.calibration import fit_imbalance, fit_sustained, fit_trace, trace_times
from dsv3_megatron.plan.cost import report_totals
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.published import RUNS
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
    assert abs(rows["bubble of rank 0", "s"].error) < 0.20


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
    assert table.sustained == pytest.approx(fit_sustained(H800), abs=0.01)
    assert pytest.approx(fit_imbalance(H800), abs=0.01) == LOAD_IMBALANCE


def test_every_operator_of_the_trace_is_near() -> None:
    published = deepseek.TRACE_COMPUTE | deepseek.TRACE_COMMUNICATION
    times = trace_times(H800)
    for name, ms in published.items():
        assert times[name] == pytest.approx(ms, rel=0.15), name


def test_other_published_runs() -> None:
    """Predicted, none fitted, all within 15%; two kinds of GPU."""
    rows = bench.run_rows()
    assert len(rows) == len(RUNS) >= 3
    assert {run.gpu for run in RUNS} == {"h100", "gb200"}
    assert all(abs(row.error) < 0.15 for row in rows), rows


def test_all_to_all_alone_grows_with_expert_parallelism_as_published() -> None:
    for row in bench.all_to_all_rows():
        assert abs(row.error) < 0.35, row
    hopper = {row.what: row for row in bench.all_to_all_rows() if row.what.startswith("h100")}
    assert all(abs(row.error) < 0.25 for row in hopper.values())


def test_the_parts_of_the_step_are_named_and_add_up() -> None:
    parts = bench.steps_towards_the_whole()
    assert parts[0][1] == pytest.approx(17.2, abs=0.3)  # uniform stages, free messages: the trace alone
    assert parts[-1][1] == pytest.approx(deepseek.STEP_S, rel=0.05)


def test_the_reports_totals() -> None:
    totals = {phase: (hours, money) for phase, hours, money in report_totals(deepseek.GPU_HOURS_PER_1T)}
    assert totals["pre-training"][0] == pytest.approx(2664)
    assert totals["total"] == pytest.approx((2788, 5.576), rel=1e-3)
