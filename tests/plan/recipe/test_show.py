"""The commands: the contract of the JSON line, the table, the picture, the phases, and what is refused."""

import json

import pytest

from dsv3_megatron.plan.recipe import ranks, show


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json(capsys) -> None:
    show.main(["recipe=v3_pretrain", "tokens=14.8e12", "at=[5e12,14.4e12]", "output=json"])
    assert last_line(capsys) == {
        "at": [
            {"tokens": 5e12, "lr": 2.2e-4, "batch": 15360, "gamma": 0.001, "mtp_weight": 0.3},
            {"tokens": 14.4e12, "lr": 2.2e-5, "batch": 15360, "gamma": 0.0, "mtp_weight": 0.1},
        ]
    }


def test_another_budget_and_overrides(capsys) -> None:
    """Half of 1.48T is 5T of 14.8T."""
    show.main(["recipe=v3_pretrain", "tokens=1.48e12", "at=[5e11,1.47e12]", "lr=1e-3", "output=json"])
    first, last = last_line(capsys)["at"]
    assert first["lr"] == 1e-3 and first["mtp_weight"] == 0.3
    assert last["lr"] == 7.3e-6 and last["gamma"] == 0.0


def test_table_and_picture(capsys, tmp_path) -> None:
    show.main(["output=table"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "14,633.000B" in lines[6] and "7.3e-06" in lines[6]
    show.main(["output=png", f"file={tmp_path / 'x.png'}"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (["output=svg"], "output=svg: use output=json or output=table or output=png"),
        (["recipe=v3_pretrian"], "did you mean 'v3_pretrain'?"),
        (["at=[5e12,x]"], "at=x: write a whole number of tokens"),
        (["tokens=1e12", "at=[2e12]"], "at=2e+12: the run has 1e+12 tokens"),
        (["tokens=1e6"], "too few for 16 increments"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        show.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_phases_of_the_published_layout(capsys) -> None:
    words = ["model=v3_671b", "layout=pp16_ep64", "schedule=dualpipe"]
    ranks.main([*words, "output=json"])
    phases = last_line(capsys)["phases"]
    assert [phase["world_size"] for phase in phases] == [1024, 2048]
    assert phases[1]["first_step"] == 4194 and phases[1]["microbatches"] == [36, 120]
    ranks.main(words)
    assert "1024" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ranks.main([*words, "batch_ramp=[1000,14360]"])
    assert "batch size 1000 does not give" in capsys.readouterr().err
