"""docs/plan.md as a newcomer types it: each row of the error table is a command, which prints the row's figure."""

import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from dsv3_megatron.plan import __main__ as command
from dsv3_megatron.plan import proxy, step
from dsv3_megatron.plan.__main__ import planned_of
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.options import parse
from dsv3_megatron.plan.published import RUNS
from dsv3_megatron.studies import published_lines

DOC = Path(__file__).parents[2] / "docs" / "plan.md"
# One of each hardware, dispatcher, precision and kind of graph; the slow run types all.
SOME = (
    "1024 H100, FP8 blockwise, TP2 PP8 VPP4 EP64, DeepEP, overlap",
    "64 H100, BF16, 14 layers, 2048 tokens, all-to-all, full recompute, overlap",
    "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 8 microbatches",
    "256 GB200, MXFP8, PP8 VPP4 EP32, step 7: DeepEP tuned",
    "256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph",
    "16 H100, Moonlight, BF16, EP8, HybridEP, overlap, two sequences, GBS 1024",
    "256 B300, NVFP4, PP16 EP8, HybridEP",
)


@cache
def rows() -> dict[str, list[str]]:
    """Cells of the documented tables by the row's name."""
    found: dict[str, list[str]] = {}
    for line in DOC.read_text().splitlines():
        if line.startswith("| ") and line.endswith(" |"):
            name, *cells = line.strip("| ").split(" | ")
            found.setdefault(name, cells)
    return found


@cache
def lines() -> dict[str, list[str]]:
    """Words of the documented commands by the name in the comment above, as a shell gives them to `dsv3`."""
    block = next(
        block for block in re.findall(r"```bash\n(.*?)```", DOC.read_text(), re.DOTALL) if "V3=" in block
    )
    names = re.findall(r"^# (.*)$", block, re.MULTILINE)
    asked = subprocess.run(
        ["bash", "-c", "dsv3() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n" + block],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = [one.split("\0")[:-1] for one in asked.split("\n\0") if one]
    return dict(zip(names, words, strict=True))


def test_every_row_has_its_command() -> None:
    assert list(lines()) == [run.name for run in RUNS]
    for run in RUNS:
        domain, published, predicted, error = rows()[run.name]
        assert domain.startswith(run.gpu) and published.endswith(" s"), run.name
        figure = step.plan(run.job, GPUS[run.gpu], run.counts).step_s
        assert predicted == f"{figure:.4g} s", run.name
        assert error == f"{figure / run.step_s - 1:+.1%}", run.name
        assert lines()[run.name][:2] == ["plan", "--launch"]
        assert shlex.join(lines()[run.name]).count("$") == 0


def _types(name: str) -> None:
    run = next(run for run in RUNS if run.name == name)
    planned = planned_of(parse(lines()[name][1:]))
    assert planned.job == run.job and planned.counts == run.counts and planned.gpu.name == run.gpu
    assert rows()[name][2] == f"{step.plan(planned.job, planned.gpu, planned.counts).step_s:.4g} s"


@pytest.mark.parametrize("name", SOME)
def test_the_command_prints_the_row(name: str) -> None:
    _types(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [run.name for run in RUNS if run.name not in SOME])
def test_all_the_others_too(name: str) -> None:
    _types(name)


def test_deepseeks_rows_are_printed(capsys: pytest.CaptureFixture) -> None:
    """By the command in front of their table, all but the pair, which the calibration prints."""
    (words,) = re.findall(r"^    dsv3 plan (.*h800_2048 .*flex)$", DOC.read_text(), re.MULTILINE)
    command.main(shlex.split(words))
    out = capsys.readouterr().out
    told = {
        name: rows()[name][1].split()[0] for name in ("step", "tokens/s/GPU", "bubble of rank 0", "optimizer")
    }
    assert f"{float(told['step']):.2f}" in out and told["tokens/s/GPU"] in out
    assert f"idle {float(told['bubble of rank 0']):.3f} s" in out
    assert f"{float(told['optimizer']):.3f} s not hidden" in out
    for kind in ("F", "I", "W", "F&B"):
        assert f"{kind} {float(rows()[f'mean {kind} of rank 0'][1].split()[0]):.1f}" in out, kind


def test_an_anchored_row_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One published run, as a file, predicts another of its hardware: the figure of the documented table."""
    anchor = "256 GB300, MXFP8, PP2 VPP8 EP32, HybridEP, overlap, one graph"
    run = next(run for run in RUNS if run.name == anchor)
    other = next(run for run in RUNS if run.name == f"{anchor}, GBS 15360")
    _, _, launch, *beside = lines()[anchor]
    said = dict(word.split("=", 1) for word in beside)
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"launch": launch, "step_s": run.step_s, **said}))
    command.main([*lines()[other.name][1:], f"anchor={file}", "output=json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = next(
        line for line in DOC.read_text().splitlines() if line.startswith(f"| {anchor} | {other.name} |")
    )
    assert row.split(" | ")[-1].rstrip(" |") == f"{found['step_s'] / other.step_s - 1:+.1%}"
    assert found["anchored_speed"] == pytest.approx(1.08, abs=0.1)


def test_the_generator_writes_what_is_documented() -> None:
    text = DOC.read_text()
    assert f'V3="{published_lines.V3}"' in text
    assert all(published_lines.line(run) in text for run in RUNS)


def _without(launch: str) -> str:
    """The line less what the recipe leaves out, on no said number of nodes."""
    kept: list[str] = []
    skipping = False
    for word in shlex.split(launch):
        if word.startswith("--"):
            skipping = word.partition("=")[0] in (*proxy.LEFT_OUT, "--nnodes")
        if not skipping:
            kept.append(word)
    return shlex.join(kept)


@pytest.mark.parametrize("name", SOME)
def test_the_proxy_of_a_line_is_planned(name: str, capsys: pytest.CaptureFixture) -> None:
    """As it is printed: the line with its words, which fits on its nodes."""
    words = lines()[name][1:]
    command.main([*words, "--proxy"])
    why, _, recipe, *_ = capsys.readouterr().out.splitlines()
    nodes = re.search(r"(\d+) nodes of", why)
    typed = [
        words[0],
        f"{_without(words[1])} {recipe.strip()}",
        *words[2:],
        f"nodes={nodes[1] if nodes else 1}",
    ]
    command.main([*typed, "output=json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]
