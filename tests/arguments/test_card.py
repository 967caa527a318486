"""`dsv3 card --report`: a stage's row on the card, and every report that must be refused."""

import copy
import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.arguments import card, support
from dsv3_megatron.errors import RefusedArgument

DOCS = Path(__file__).parents[2] / "docs"
GPU = "NVIDIA H100 80GB HBM3"
TITLE = "versions, kernels against their references"
FEATURE = f"First GPU hour, stage 1: {TITLE}"


SOURCES = card.source()


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once."""
    monkeypatch.setattr(card, "source", lambda: SOURCES)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copy(DOCS / "verification.toml", folder)
    return folder


def step(result: str = "passed", counts: Any = None, **figures: str) -> dict[str, Any]:
    counts = counts or {result: 3}
    return {
        "stage": "1",
        "result": result,
        "counts": counts,
        "figures": figures,
        "seconds": 1.5,
        "date": "2026-11-26",
        "command": "bash gpu_bundle/run.sh 1",
        "tests": [
            {"test": f"t{i}", "result": name, "seconds": 0.5, "figures": {}}
            for name, count in counts.items()
            for i in range(count)
        ],
    }


def report(device: str = GPU, **steps: Any) -> dict[str, Any]:
    return {
        "format": card.FORMAT,
        "version": "0.1.0",
        "source": SOURCES,
        "device": device,
        "machine": {},
        "stages": {
            "1": {"title": TITLE, "steps": ["versions", "kernels"]},
            "2": {"title": "speeds", "steps": ["speeds"]},
        },
        "steps": steps or {"versions": step(), "kernels": step(promoted_error="1.1e-05")},
    }


def enter(docs: Path, content: Any) -> dict[str, dict[str, Any]]:
    """The card's rows by feature after the report was entered."""
    file = docs.parent / "report.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert card.main(["--report", str(file), "--docs", str(docs)]) == 0
    return {row["feature"]: row for row in tomllib.loads((docs / "verification.toml").read_text())["card"]}


def test_a_stage_that_ran_names_the_gpu_and_its_figures(docs: Path) -> None:
    before = {row["feature"]: row for row in support.load_cards(docs)}
    after = enter(docs, report())
    row = after[FEATURE]
    assert row["status"] == f"run on {GPU}" and row["command"] == "bash gpu_bundle/run.sh 1"
    assert row["figure"] == "versions: 3 passed; kernels: 3 passed (promoted_error 1.1e-05)"
    assert str(row["date"]) == "2026-11-26" and row["source"] == SOURCES
    assert {k: v for k, v in after.items() if k != FEATURE} == {
        k: v for k, v in before.items() if k != FEATURE
    }
    page = (docs / "support.md").read_text()
    assert page == support.render(support.load_cards(docs)) and f"run on {GPU}" in page
    assert enter(docs, report()) == after  # once more is no second row
    comments = [
        line for line in (DOCS / "verification.toml").read_text().splitlines() if line.startswith("#")
    ]
    assert [
        line for line in (docs / "verification.toml").read_text().splitlines() if line.startswith("#")
    ] == comments


def test_a_rehearsal_has_a_row_of_its_own_and_leaves_the_gpus(docs: Path) -> None:
    before = enter(docs, report())[FEATURE]
    after = enter(docs, report(device="CPU"))
    assert after[FEATURE] == before
    rehearsed = after[f"First GPU hour, stage 1, rehearsed with stand-ins: {TITLE}"]
    assert rehearsed["status"] == "run on CPU"


def test_what_failed_or_did_not_run_is_on_the_card(docs: Path) -> None:
    row = enter(docs, report(kernels=step("failed", {"passed": 20, "failed": 2})))[FEATURE]
    assert row["figure"] == "versions: not run; kernels: failed, 20 passed, 2 failed"
    row = enter(docs, report(versions=step("killed at its limit", {"passed": 1, "not finished": 1})))[FEATURE]
    assert row["figure"].startswith("versions: killed at its limit, 1 passed, 1 not finished;")
    row = enter(docs, report(versions=step("skipped"), kernels=step("skipped")))[FEATURE]
    assert row["status"] == "not run"


def without(*path: str) -> dict[str, Any]:
    changed: Any = report()
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no json", "not readable as JSON"),
        ("[]", "holds no report"),
        (without("device"), "it lacks device; run the stage again"),
        (without("steps", "kernels", "figures"), "it lacks steps.kernels.figures; run the stage again"),
        (without("stages", "1"), "steps.versions is no step of stages.1"),
        (report(other=step()), "steps.other is no step of stages.1"),
        (report(kernels=step("passed", {"passed": 2, "failed": 1})), "steps.kernels has passed, but not all"),
        (
            report(kernels=step() | {"counts": {"passed": 4}}),
            "steps.kernels.counts are not those of its tests",
        ),
        (
            report(kernels=step() | {"result": "splendid"}),
            'steps.kernels.result is "splendid", none of passed',
        ),
        ("[" * 100_000, "not readable as JSON"),
        (report("\ud800"), 'device is "\\ud800", with characters that cannot be written'),
        (report("H100\x7f"), "with characters that cannot be written"),
        (report(kernels=step("passed", {"skipped": 3})), "steps.kernels has passed, but none of its tests"),
        (report(kernels=step("passed") | {"counts": {}, "tests": []}), "but none of its tests has"),
        (report(kernels=step() | {"date": "today"}), 'steps.kernels.date is "today", no date'),
        (report(" "), "device is empty"),
        (report() | {"steps": {}}, "no step was run"),
        (report() | {"version": "0.0.9"}, "its version is '0.0.9', that of this checkout '0.1.0'"),
        (report() | {"source": "0" * 16}, "its source is '0000000000000000', that of this checkout"),
        (report() | {"format": 0}, "its format is 0, that of this checkout 1"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refused_in_one_line(content: Any, reason: str, docs: Path, capsys: pytest.CaptureFixture) -> None:
    before = (docs / "verification.toml").read_text()
    with pytest.raises(SystemExit) as stopped:
        enter(docs, content)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: --report ") and said.count("\n") == 1
    assert reason in said
    assert (docs / "verification.toml").read_text() == before


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield from parts(value[name], (*path, name))


def test_any_part_that_is_something_else_is_refused_in_one_line_or_makes_rows(tmp_path: Path) -> None:
    """Every part of a report replaced by every kind of value: no traceback, and no row with two lines."""
    file, seen = tmp_path / "report.json", Counter[str]()
    whole = report(versions=step("passed", {"passed": 1}, lacking="nothing"))
    for path in parts(whole):
        for wrong in (None, True, 7, 0.5, "x", "two\nlines", [], [1], {}, {"a": 1}):
            changed: Any = {"": copy.deepcopy(whole)}
            inner = changed
            for name in ("", *path)[:-1]:
                inner = inner[name]
            inner[("", *path)[-1]] = wrong
            file.write_text(json.dumps(changed[""]))
            try:
                rows = card.rows_of(card.read(file))
            except RefusedArgument as error:
                assert str(error).startswith("--report ") and "\n" not in str(error), (path, wrong)
                seen["refused"] += 1
            else:
                text = card.entered("[[card]]\n", rows)
                assert tomllib.loads(text)["card"] and "\\n" not in text, (path, wrong)
                seen["accepted"] += 1
    assert seen["refused"] > 100 and seen["accepted"] > 10


def test_a_missing_card_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        card.main(["--report", str(tmp_path / "report.json"), "--docs", str(tmp_path)])
    assert "there is no verification.toml" in capsys.readouterr().err


def test_a_gpus_name_without_sources_is_no_status(docs: Path) -> None:
    """Nobody writes such a row by hand."""
    with open(docs / "verification.toml", "a") as file:
        file.write(
            f'\n[[card]]\nfeature = "x"\nstatus = "run on {GPU}"\ncommand = ""\nfigure = ""\ndate = 2026-11-26\n'
        )
    with pytest.raises(ValueError, match="is none of"):
        support.load_cards(docs)
