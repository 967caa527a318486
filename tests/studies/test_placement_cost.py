"""The benchmark of moves moves every expert, and says what of a step that is."""

import json

import pytest

from dsv3_megatron.studies.placement_cost import main


@pytest.mark.slow
def test_it_prints_a_ratio(capsys):
    main(["--steps", "7", "model=micro", "vocab_size=2048"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["experts"] > 0 and found["ratio"] == pytest.approx(
        found["move_s"] / found["step_s"], rel=0.01
    )
