"""The comparison of schedules, and the page that quotes it."""

from pathlib import Path

import pytest

from dsv3_megatron.pipeline import Costs, build_schedule, simulate
from dsv3_megatron.pipeline.compare import V3_COSTS, compare, main, report, same_stages

DOCS = Path(__file__).parents[2] / "docs" / "dualpipe.md"


@pytest.mark.parametrize("num_microbatches", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_the_page_quotes_what_the_simulator_says(num_microbatches):
    assert report(num_microbatches) in DOCS.read_text()


def test_halved_stages_keep_the_model_the_same():
    """Every schedule gives a rank the same work: 128 microbatches through one sixteenth of the model."""
    whole = simulate(build_schedule("dualpipe", 16, 128), Costs(**V3_COSTS))
    row = compare("dualpipe", 16, 128)
    assert (row.step, row.parameters, row.activations) == (whole.makespan, 2, 17)
    halved = compare("dualpipev", 16, 128)
    assert (halved.stages, halved.parameters, halved.activations) == (32, 1, 16.5)
    assert compare("1f1b", 16, 128, costs={"f": 1, "b": 2, "w": 1, "fb": 3}).step == 3 * 128 + 45
    assert compare("interleaved_1f1b_overlap", 16, 128, 2, {"f": 1, "b": 2, "w": 1, "fb": 3}).step == (
        (3 * 256 + 45) / 2
    )


def test_with_the_same_stages_dualpipev_is_dualpipe_folded():
    dualpipe, dualpipev, *_ = same_stages(16, 64)
    assert (dualpipe.step, dualpipe.bubble, dualpipe.parameters, dualpipe.activations) == pytest.approx(
        (dualpipev.step, dualpipev.bubble, dualpipev.parameters, dualpipev.activations)
    )


def test_compare_prints_the_report_and_refuses_with_the_reason(capsys):
    main(["--microbatches", "32"])
    assert report(32) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--microbatches", "40"])
    assert "num_microbatches=40 leaves a last group of 8" in capsys.readouterr().err
