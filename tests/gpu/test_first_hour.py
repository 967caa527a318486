"""What can be tested of the first GPU hour without a GPU, in seconds: limits, process groups, report, tiny pieces.

The stages themselves are rehearsed by `run.sh STAGE --cpu-rehearsal`; the slow test at the end does so from the bundle.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import overlap, processes, run, trainer
from tests.gpu.overlap import Interval
from tests.gpu.report import Report
from tests.gpu.stages import STAGE_LIMIT_S, STAGES, TOTAL_LIMIT_S, Step, all_steps

ROOT = Path(__file__).parents[2]


def test_limits() -> None:
    """Each stage of one GPU under eight minutes, all of them on eight GPUs under ninety, by their limits."""
    assert all(STAGES[number].limit_s <= STAGE_LIMIT_S for number in "1234")
    assert sum(stage.limit_s for stage in STAGES.values()) <= TOTAL_LIMIT_S
    page = (ROOT / "docs" / "gpu.md").read_text()
    for name, stage in STAGES.items():
        assert re.search(rf"^\| {name} \| .* \| {stage.limit_s} s \|$", page, re.MULTILINE), name


def test_every_gpu_test_is_in_one_step() -> None:
    """Functions of the files that are marked, and those that the steps name: the same, each once."""
    from tests.gpu.test_trainer import LAYOUTS

    marked = re.compile(r"^(pytestmark = |@)pytest\.mark\.gpu", re.MULTILINE)
    tests = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        if marked.search(source):
            where = path.relative_to(ROOT).as_posix()
            tests += [f"{where}::{name}" for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)]
    named = [path for _, step in all_steps() for path in step.tests]
    for test in tests:
        file, function = test.split("::")
        ways = [name for name in named if name in (file, test) or name.startswith(f"{test}[")]
        expected = len(LAYOUTS) if function == "test_losses" else 1
        assert len(ways) == len(set(ways)) == expected, f"{test} is in {ways}"
    files = {test.split("::")[0] for test in tests}
    assert {name.split("::")[0] for name in named} == files


# --- process groups


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HANGS = """
import os, subprocess, sys, time
# A grandchild in a session of its own, as torchrun's ranks are, whose parent ends at once.
code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'],"
code += "start_new_session=True); print(p.pid, flush=True)"
subprocess.run([sys.executable, "-c", code])
print(os.getpid(), flush=True)
time.sleep(99)
"""
DRIVER = """
import sys
from pathlib import Path
from tests.gpu.processes import adopt_orphans, run
adopt_orphans()
ended = run([sys.executable, "-c", {program!r}], {limit}, Path({log!r}))
print(ended.status)
"""


def test_a_step_at_its_limit_is_killed_with_what_it_left_in_other_sessions(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = DRIVER.format(program=HANGS, limit=4, log=str(log))
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "None", done.stderr
    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 2 and time.monotonic() - start < 30
    assert not any(alive(pid) for pid in pids)


def test_a_hung_rank_is_killed_with_its_group(tmp_path: Path) -> None:
    """One rank ends, one hangs: the test fails in time, and says which."""
    (tmp_path / "rank_that_hangs.py").write_text(
        "import os, sys, time\nprint('pid', os.getpid(), flush=True)\nos.environ['RANK'] == '1' and time.sleep(99)\n"
    )
    with pytest.raises(processes.RanksFailed, match=r"rank 1 had not ended after 5 s"):
        processes.run_ranks("rank_that_hangs", [], 2, tmp_path, 5, {"PYTHONPATH": str(tmp_path)})
    pid = int((tmp_path / "rank1.log").read_text().split()[1])
    assert not alive(pid)


def test_a_failed_rank_is_named_with_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "rank_that_fails.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no such layer')\ntime.sleep(99)\n"
    )
    start = time.monotonic()
    with pytest.raises(
        processes.RanksFailed, match="rank 1 ended with status 1; its output ends:\nno such layer"
    ):
        processes.run_ranks("rank_that_fails", [], 2, tmp_path, 60, {"PYTHONPATH": str(tmp_path)})
    assert time.monotonic() - start < processes.LINGER_S + 10


# --- report


STEP = Step("tiny", "a step", (), 60, ("loss",))


def step_of(folder: Path, source: str) -> tuple[int, list[dict]]:
    """Status and rows of a pytest process over a file with this source."""
    (folder / "test_it.py").write_text(source)
    rows = folder / "tiny.rows.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.gpu.rows",
        f"--gpu-rows={rows}",
        "-c",
        os.devnull,
    ]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder / "test_it.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(rows.read_text())


TESTS = (
    "import os, pytest\n"
    "def test_good(record_property):\n    record_property('loss', 1.25)\n"
    "def test_bad():\n    assert 1 == {two}\n"
    "def test_skipped():\n    pytest.skip('too few')\n"
    "@pytest.fixture\ndef broken():\n    assert {two} == 1, 'no device'\n"
    "def test_broken(broken):\n    pass\n"
    "def test_crash():\n    {crash}\n"
)


def test_rows_hold_results_figures_and_reasons_and_what_passed_is_not_run_again(tmp_path: Path) -> None:
    status, rows = step_of(tmp_path, TESTS.format(two=2, crash="os._exit(9)"))
    by_name = {row["test"].split("::")[1]: row for row in rows}
    assert status == 9
    assert {name: row["result"] for name, row in by_name.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_broken": "failed",
        "test_crash": "not finished",
    }
    assert by_name["test_good"]["figures"] == {"loss": 1.25}
    assert "1 == 2" in by_name["test_bad"]["reason"] and "no device" in by_name["test_broken"]["reason"]
    assert "too few" in by_name["test_skipped"]["reason"]

    report = Report(tmp_path, "CPU")
    entry = report.add("1", STEP, status, 1.0, "bash gpu_bundle/run.sh 1")
    assert entry["result"] == "failed" and entry["figures"] == {"loss": "1.25"}
    assert entry["counts"] == {"failed": 2, "not finished": 1, "passed": 1, "skipped": 1}
    text = (tmp_path / "report.md").read_text()
    assert "test_good | passed" in text and "loss = 1.25" in text and "too few" in text

    (tmp_path / "test_it.py").unlink()
    good_now_bad = TESTS.format(two=1, crash="pass").replace("record_property('loss', 1.25)", "assert False")
    status, rows = step_of(tmp_path, good_now_bad)
    assert status == 0  # test_good was left out
    results = [row["result"] for row in rows]
    assert results.count("passed") == 4 and results.count("skipped") == 1
    again = Report(tmp_path, "CPU")  # read from the file
    assert not again.passed("tiny")
    assert again.add("1", STEP, status, 1.0, "")["result"] == "passed" and Report(tmp_path, "CPU").passed(
        "tiny"
    )


@pytest.mark.parametrize(
    ("status", "results", "result"),
    [
        (None, ["passed"], "killed at its limit"),
        (0, [], "failed"),
        (4, ["passed"], "failed"),
        (0, ["skipped"], "skipped"),
    ],
)
def test_a_step_passes_only_when_something_did(status, results, result, tmp_path: Path) -> None:
    report = Report(tmp_path, "CPU")
    rows = [{"test": f"t{i}", "result": r, "seconds": 0, "figures": {}} for i, r in enumerate(results)]
    (tmp_path / "tiny.rows.json").write_text(json.dumps(rows))
    assert report.add("1", STEP, status, 0.0, "")["result"] == result


def test_a_report_of_another_device_or_version_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "tiny.rows.json").write_text(
        '[{"test": "t", "result": "passed", "seconds": 0, "figures": {}}]'
    )
    Report(tmp_path, "CPU").add("1", STEP, 0, 0.0, "")
    assert not Report(tmp_path, "NVIDIA H100 80GB HBM3").passed("tiny")
    assert list(tmp_path.glob("old-*-report.json")) and not (tmp_path / "tiny.rows.json").exists()


# --- refusals


@pytest.mark.parametrize(("num_gpus", "reason"), [(0, "no CUDA GPU"), (3, "3 GPUs are visible")])
def test_a_machine_that_cannot_run_them_is_named(num_gpus: int, reason: str) -> None:
    assert reason in (run.obstacle(num_gpus) or "")


def test_a_machine_that_can() -> None:
    assert run.obstacle(1) is run.obstacle(8) is None


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.run", "1", "--out", str(tmp_path / "report")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=hidden)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no CUDA GPU is visible. Nothing was run" in done.stderr
    assert not (tmp_path / "report").exists()


def test_a_step_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["1", "--only", "speeds", "--cpu-rehearsal", "--out", str(tmp_path / "report")]
    assert run.main(words) == 2
    said = capsys.readouterr().err
    assert said == "--only speeds: the steps are versions, kernels, sanitizer\n"
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["5"], "error: stage 5: use 1, 2, 3, 4, gpus"),
        (["1", "--rehearsal"], "error: unrecognized arguments: --rehearsal"),
        (["1", "--only"], "error: argument --only: expected one argument"),
    ],
)
def test_a_wrong_line_is_refused_in_one(words: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(words)
    said = capsys.readouterr().err
    assert said.startswith(says) and said.count("\n") == 1


# --- measures


def test_the_sanitizer_sees_every_kernel() -> None:
    from dsv3_megatron.fp8 import kernels
    from tests.gpu import tiny_kernels

    assert set(tiny_kernels.calls()) == set(kernels.__all__), "tests/gpu/tiny_kernels.py must call them all"


def test_the_unpromoted_control_is_one_chain_of_products(tmp_path: Path) -> None:
    """Compiled for Hopper: FP8 wgmma without fp32 additions between them, which our product has."""
    import torch

    from dsv3_megatron.fp8 import kernels
    from dsv3_megatron.fp8.kernels.compile import compile_launch
    from dsv3_megatron.fp8.kernels.launch import Launch, recording
    from dsv3_megatron.fp8.kernels.resources import read_resources
    from tests.gpu import unpromoted

    a = torch.empty(256, 16384, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(256, 128, device="meta")
    launches: list[Launch] = []
    with recording(launches.append):
        unpromoted.product(a, a)
        kernels.gemm_nt((a, scale), (a, scale))
    additions = []
    for planned in launches:
        _, cubin = compile_launch(planned, tmp_path)
        assert read_resources(cubin).fp8_wgmma > 0
        additions.append(
            len(re.findall(r"\b(?:add|fma)\S*\.f32(?:x2)?\b", cubin.with_suffix(".ptx").read_text()))
        )
    assert additions[0] == 0 < additions[1]


def test_share_of_overlap() -> None:
    compute = [Interval("compute", 0, 4), Interval("compute", 4, 10)]
    assert overlap.overlap_share(compute) == 0
    assert overlap.overlap_share([*compute, Interval("messages", 9, 13)]) == pytest.approx(0.25)
    assert overlap.overlap_share([*compute, Interval("a", 1, 3), Interval("b", 2, 4)]) == 1
    assert overlap.overlap_share([*compute, Interval("messages", 12, 13)]) == 0


def test_kernels_of_a_trace(tmp_path: Path) -> None:
    events = [
        {"cat": "kernel", "ts": 1.0, "dur": 2.0, "args": {"stream": 7}},
        {"cat": "cpu_op", "ts": 0.0, "dur": 9.0, "args": {}},
        {"cat": "gpu_memcpy", "ts": 2.0, "dur": 1.0, "args": {"stream": 13}},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert overlap.kernels_of(tmp_path / "trace.json") == [Interval(7, 1.0, 3.0), Interval(13, 2.0, 3.0)]


def test_worst_gradient_is_in_units_of_the_others_error() -> None:
    import torch

    exact = {"w": torch.ones(4), "b": torch.ones(1)}
    cpu = {"w": torch.ones(4) * 1.01, "b": torch.ones(1)}
    gpu = {"w": torch.ones(4) * 0.98, "b": torch.ones(1)}
    ratio, name = trainer.worst_gradient(gpu, cpu, exact, floor=1e-3)
    assert name == "w" and ratio == pytest.approx(2.0, rel=1e-3)
