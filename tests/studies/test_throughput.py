"""The training benchmark measures both schedules in trainers of their own."""

import json

import pytest

from dsv3_megatron.studies.throughput import main


@pytest.mark.slow
def test_it_prints_a_rate_of_each_run_and_their_ratio(capsys) -> None:
    main(["--iterations", "8", "--rounds", "1", "model=micro", "vocab_size=2048"])
    first, second, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [first["schedule"], second["schedule"]] == ["1f1b", "dualpipe"]
    assert first["tokens_per_s"] > 0 and second["tokens_per_s"] > 0
    ratio = second["tokens_per_s"] / first["tokens_per_s"]
    assert last["ratio_to_1f1b"] == {"1f1b": 1.0, "dualpipe": pytest.approx(ratio, rel=1e-2)}


def test_a_run_without_counted_iterations_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--iterations", "5"])
    assert "--iterations 5" in capsys.readouterr().err
