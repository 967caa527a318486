"""The speed measurement measures: all cases, plausible times, and the runner's own cost."""

import json
import os
import subprocess
import sys

import pytest

from dsv3_megatron.studies.pipeline_speed import _build, main


def test_bench_measures_every_schedule_and_megatrons_own():
    """Two ranks, 10 ms units. The bounds are wide: the machine may be busy, but nobody sleeps too short."""
    module = [sys.executable, "-m", "dsv3_megatron.studies.pipeline_speed"]
    done = subprocess.run(
        [
            *module,
            "--ranks",
            "2",
            "--microbatches",
            "6",
            "--unit-ms",
            "10",
            "--p2p",
            "0",
            "0.5",
            "--repeats",
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    cases = {(line["case"], line["costs"]["p2p"]): line for line in lines if "executed_s" in line}
    names = ["megatron_1f1b", "1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved_1f1b_overlap", "zigzag"]
    assert list(cases) == [(name, latency) for latency in (0, 0.5) for name in names]
    for line in cases.values():
        assert 0.97 < line["ratio_to_simulated"] < 3, line
        assert line["ratio_to_simulated"] == pytest.approx(line["executed_s"] / line["simulated_s"], rel=1e-2)
    # By hand, two ranks and 6 microbatches: 1F1B 6·3 + 3 units, DualPipe no bubble at all.
    assert cases["1f1b", 0]["simulated_s"] == pytest.approx(0.21)
    assert cases["dualpipe", 0]["simulated_s"] == pytest.approx(0.18)
    overhead = {line["case"]: line["us_per_action"] for line in lines if "us_per_action" in line}
    assert set(overhead) == {"scheduler_overhead_with_p2p", "scheduler_overhead_one_rank"}
    assert 0 < overhead["scheduler_overhead_one_rank"] < 500


def test_bench_refuses_sizes_before_it_starts_processes(capsys):
    with pytest.raises(SystemExit):
        main(["--ranks", "8", "--microbatches", "10", "--schedules", "dualpipe"])
    assert "num_microbatches=10 is too few for dualpipe" in capsys.readouterr().err


def test_bench_gives_the_interleaved_schedule_a_group_that_megatron_accepts():
    """20 microbatches on 8 ranks: groups of 8 would leave 4."""
    schedule = _build("interleaved_1f1b_overlap", 8, 20)
    assert [action.microbatch for action in schedule.ranks[0][:11]] == [*range(10), 0]
