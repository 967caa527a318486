"""Launch lines shrunk by the rule, and proofs of them with their controls."""

import json
import shutil
from pathlib import Path

import pytest

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.prove.__main__ import main
from dsv3_megatron.prove.line import MAX_PROCESSES, shrink
from dsv3_megatron.prove.runs import RunFailed, _last_words
from tests.harness import DistributedFailure, run_distributed

LINE = [
    *(
        "torchrun",
        "--nproc-per-node",
        "8",
        "-m",
        "dsv3_megatron.train",
        "--spec",
        "dsv3",
        "--num-layers",
        "61",
    ),
    *(
        "--hidden-size",
        "7168",
        "--bf16",
        "--pipeline-model-parallel-size",
        "16",
        "--expert-model-parallel-size",
        "64",
    ),
    *(
        "--use-distributed-optimizer",
        "--seed",
        "7",
        "--recompute-granularity",
        "selective",
        "--save",
        "/data/run",
    ),
    *("--data-path", "/data/corpus", "--lr", "2.2e-4", "--global-batch-size", "15360"),
    *("--pipeline-schedule", "dualpipe"),
]


SPLIT = ["--spec", "dsv3", "--pipeline-model-parallel-size", "2"]


def value(words, option):
    return words[words.index(option) + 1] if option in words else None


def test_the_shape_stays_and_the_size_goes():
    small = shrink(LINE)
    assert small.world_size == 4 and small.data_parallel == 2
    for option, wanted in (
        ("--pipeline-model-parallel-size", "2"), ("--expert-model-parallel-size", "2"), ("--num-layers", "8"),
        ("--hidden-size", "32"), ("--seed", "7"), ("--pipeline-schedule", "dualpipe"), ("--device", "cpu"),
        ("--recompute-granularity", "selective"), ("--global-batch-size", "16"),
    ):  # fmt: skip
        assert value(small.words, option) == wanted, option
    assert "--bf16" in small.words and "/data/run" not in " ".join(small.words)
    assert {"--save", "--data-path", "--num-layers", "--global-batch-size"} <= set(small.dropped)
    assert {"--hidden-size", "--lr"} == set(small.set)
    assert "--pipeline-model-parallel-size 16 became 2" in small.notes
    exact = shrink(LINE, precision=False)
    assert "--bf16" not in exact.words and "--use-distributed-optimizer" not in exact.words
    single = shrink(LINE, single=True)
    assert single.world_size == 1 and "--pipeline-schedule" not in single.words
    assert (
        value(single.words, "--num-layers") == "8"
        and value(single.words, "--moe-layer-freq") == "[0]*1+[1]*7"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["model=v3_671b", "layout=pp16_ep64", "schedule=dualpipe"],
        ["model=tiny", "layout=cpu_pp2_ep2", "device=cpu"],
        ["--tensor-model-parallel-size", "4", "--sequence-parallel", "--context-parallel-size", "4", "--bf16",
         "--expert-model-parallel-size", "8", "--pipeline-model-parallel-size", "4"],
        ["--tensor-model-parallel-size", "4", "--expert-tensor-parallel-size", "1", "--expert-model-parallel-size", "8",
         "--sequence-parallel"],
        ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--sequence-parallel",
         "--pipeline-model-parallel-size", "2"],
    ],
)  # fmt: skip
def test_other_lines(words):
    small = shrink(words)
    assert 1 < small.world_size <= MAX_PROCESSES
    everything = {option for option in small.kept if option.startswith("--")} | {*small.set, *small.dropped}
    assert "--hidden-size" in everything or "model=" not in words[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["layout"], "there is no launch line"),
        (["layout", "python", "other.py"], "starts no trainer of ours"),
        (["resume", "--steps", "0", *LINE], "--steps: 0: must be"),
        (["resume", "--spec", "dsv3", "--pipelin-schedule", "dualpipe"], "--pipelin-schedule"),
        (["layout", *SPLIT[:-1], "0"], "--pipeline-model-parallel-size 0: must be 1 or more"),
        (["commit", "here"], "give OLD and NEW"),
        (["commit", "", "here"], "give OLD and NEW"),
        (["commit", "here", "--steps", "3"], "give OLD and NEW"),
        (["commit", "here", "here", "--bound", "nan"], "--bound: nan: must be a number"),
        (["layout", *LINE, "--output", "x"], "--output: our own options stand before the launch line"),
        (["fp8", "--hf", ".", "--beside", "nowhere"], "--beside nowhere: no such folder"),
        (["fp8", "--hf", ".", "--prompt", " "], "--prompt: holds no text"),
        (["fp8"], "one of the two"),
        (["fp8", "--hf", "nowhere"], "--hf nowhere: no such folder"),
    ],
)
def test_wrong_words_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_pip_does_not_have_is_refused(tmp_path, monkeypatch):
    """Either one before anything is trained; a folder's bare name is that folder."""
    from dsv3_megatron.prove.commit import prove_commit

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsv3_megatron.prove.commit.run", lambda *words, **more: pytest.fail("it trains"))
    (tmp_path / "a_copy").mkdir()
    for old, new, said in (
        ("./nowhere", "here", r"OLD \./nowhere: pip cannot install it"),
        ("here", "a_copy", r"NEW a_copy: pip cannot install it: .*not installable"),
    ):
        with pytest.raises(RefusedArgument, match=said):
            prove_commit(old, new, [])


RULE = "=" * 60


@pytest.mark.parametrize(
    "log, said",
    [
        (["error: --lr 0: must be above 0", "ValueError: x", RULE], "--lr 0: must be above 0"),
        (
            ["[rank3]: Traceback (most recent call last):", "[rank3]: RuntimeError: gloo", RULE],
            "RuntimeError: gloo",
        ),
        (
            ["  traceback : Signal 9 (SIGKILL) received by PID 71", RULE],
            "Signal 9 (SIGKILL) received by PID 71",
        ),
        (["some words", RULE], "some words"),
        ([], "no output"),
    ],
)
def test_the_last_words_of_a_run(log, said, tmp_path):
    """torchrun's own summary, with the rule under it, comes last."""
    (tmp_path / "log").write_text("\n".join(log))
    assert _last_words(tmp_path / "log") == said


@pytest.mark.parametrize("failing, word", [(1, "incomplete"), (2, "refuted")])
def test_a_line_that_does_not_run_is_not_refuted(failing, word, monkeypatch):
    """Only the run that the proof is about can refute it."""
    from dsv3_megatron.prove.layout import prove_layout
    from dsv3_megatron.prove.resume import prove_resume

    started = []

    def launch(job, world_size, first_on_path=None):
        started.append(job)
        if len(started) % 2 == failing % 2:
            raise RunFailed("killed")
        for rank in range(world_size):
            (Path(job["output"]) / f"rank-{rank}.json").write_text('{"steps": [], "loaded": []}')

    monkeypatch.setattr("dsv3_megatron.prove.runs.launch", launch)
    for prove in (prove_layout, prove_resume):
        started.clear()
        report = prove(LAYOUTS["1F1B"])
        assert report.word == word and "killed" in report.checks[-1].detail and len(started) == failing


def words_of(kind, output, *line):
    return [kind, "--output", str(output), "--json", *line]


def rank_of(rank, world_size, job):
    from dsv3_megatron.prove.recorder import record

    record(job)


@pytest.fixture
def forked(monkeypatch):
    """Ranks forked from a process that has Megatron imported, instead of torchrun."""

    def launch(job, world_size, first_on_path=None):
        assert first_on_path is None
        try:
            run_distributed(rank_of, world_size=world_size, timeout=500, init=False, job=job)
        except DistributedFailure as error:
            raise RunFailed(str(error)[-2000:]) from error

    monkeypatch.setattr("dsv3_megatron.prove.runs.launch", launch)


@pytest.fixture
def smaller(monkeypatch):
    """Half the layers, a quarter of the batch: the rule itself is run by the test under torchrun."""
    monkeypatch.setattr("dsv3_megatron.prove.line.LAYERS", 2)
    monkeypatch.setattr("dsv3_megatron.prove.line.BATCH", 4)


LAYOUTS = {
    "DualPipe, bf16": [*SPLIT, "--pipeline-schedule", "dualpipe", "--bf16"],
    "DualPipeV": [*SPLIT, "--pipeline-schedule", "dualpipev"],
    "ZB1P": [*SPLIT, "--pipeline-schedule", "zb1p"],
    "zigzag": [*SPLIT, "--pipeline-schedule", "zigzag"],
    "1F1B": SPLIT,
    "interleaved": [*SPLIT, "--num-layers", "8", "--num-virtual-stages-per-pipeline-rank", "2"],
    "TP2": ["--spec", "dsv3", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "EP2": ["--spec", "dsv3", "--expert-model-parallel-size", "2", "--use-distributed-optimizer"],
    "CP2": ["--spec", "dsv3", "--context-parallel-size", "2"],
    "TP2 × EP2": [
        "--spec", "dsv3", "--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size",
        "2",
    ],
    "TP2 × EP2, experts whole": [
        "--spec", "dsv3", "--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size",
        "2", "--expert-tensor-parallel-size", "1",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name == "EP2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_layout(name, tmp_path, capsys, forked, smaller):
    status = main(words_of("layout", tmp_path / "report", *LAYOUTS[name]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, report["word"]) == (0, "proved"), report["checks"]
    losses, gradients = report["checks"]
    assert gradients["count"] > 50 and 0 < gradients["worst"] < 1e-5 and losses["count"] >= 2
    assert {"report.md", "report.json", "gradients.json"} == {
        file.name for file in (tmp_path / "report").iterdir()
    }


@pytest.mark.slow
def test_a_wrong_gradient_is_refuted(forked, smaller):
    from dsv3_megatron.prove.layout import prove_layout

    report = prove_layout(SPLIT, spoil="gradient")
    assert report.word == "refuted" and "decoder.final_layernorm.weight" in report.checks[-1].detail, (
        report.checks
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        [*SPLIT, "--use-distributed-optimizer"],
        [*SPLIT, "--use-distributed-optimizer", "--bf16"],
        LAYOUTS["EP2"],
    ],
    ids=["PP2", "PP2, bf16", "EP2"],
)
def test_resume(line, tmp_path, capsys, forked, smaller):
    status = main(words_of("resume", tmp_path / "report", *line))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, report["word"]) == (0, "proved"), report["checks"]
    assert [check["name"] for check in report["checks"]] == [
        "losses",
        "state",
        "training moved",
        "another layout",
    ]
    assert report["checks"][1]["count"] > 100


@pytest.mark.slow
def test_a_dropped_optimizer_state_is_refuted(forked, smaller):
    from dsv3_megatron.prove.resume import prove_resume

    line = ["--spec", "dsv3", "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]
    report = prove_resume(line, across=False, spoil=["--no-load-optim"])
    held = {check.name: check.holds for check in report.checks}
    assert report.word == "refuted" and held["state"] is False and held["training moved"], report.checks


@pytest.mark.slow
def test_a_layout_under_torchrun_from_hydras_groups(tmp_path, capsys):
    words = ["model=tiny", "layout=cpu_pp2_ep2", "schedule=dualpipe", "device=cpu"]
    assert main(["layout", "--output", str(tmp_path / "report"), *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "proved"


@pytest.mark.slow
def test_versions(tmp_path, capsys):
    """The wheel that is here against one that pip installs again."""
    import importlib.metadata

    line = ["--spec", "dsv3"]
    version = f"megatron-core=={importlib.metadata.version('megatron-core')}"
    status = main(
        ["commit", "--output", str(tmp_path / "report"), "--json", "--steps", "3", version, "here", *line]
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, report["word"]) == (0, "proved"), report["checks"]
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["losses and norms"]["worst"] == 0 and checks["old version is what ran"]["holds"]
    assert "megatron_core" in report["settings"]["old installed"]


@pytest.mark.slow
def test_the_same_version_twice_is_proved(forked, smaller):
    from dsv3_megatron.prove.commit import prove_commit

    same = prove_commit("here", "here", ["--spec", "dsv3"], steps=2)
    assert same.word == "proved" and same.checks[1].worst == 0 and same.checks[1].count == 6


def test_versions_that_train_otherwise_are_refuted(forked, smaller):
    from dsv3_megatron.prove.commit import prove_commit

    other = prove_commit("here", "here", ["--spec", "dsv3"], steps=2, spoil=["--lr", "2e-3"])
    assert other.word == "refuted" and other.checks[0].holds and "step 2" in other.checks[1].detail, (
        other.checks
    )
    first = [row for row in other.tables["steps"] if row["step"] == 1]
    assert len(first) == 3 and all(
        row["off"] == 0 for row in first
    )  # until the first update they are the same


PLANTED = {
    "nothing": ("backends/norm.py", "self.eps", "self.eps"),
    "norms": ("backends/norm.py", "+ self.eps)", "+ self.eps + 1e-4)"),
    "NaN": (
        "training/step.py",
        "    return loss, num_tokens, report",
        "    bad = float('nan') if get_args().curr_iteration == 1 else 1.0\n    return bad * loss, num_tokens, report",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_copy_of_this_package(name, tmp_path, smaller):
    """Installed by pip from a folder: as it is, with other norms, with a NaN at the second step."""
    from dsv3_megatron.prove.commit import prove_commit

    root, copy = Path(__file__).parents[2], tmp_path / "copy"
    shutil.copytree(root / "dsv3_megatron", copy / "dsv3_megatron")
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(root / file, copy / file)
    file, there, planted = PLANTED[name]
    text = (copy / "dsv3_megatron" / file).read_text()
    assert there in text
    (copy / "dsv3_megatron" / file).write_text(text.replace(there, planted, 1))
    report = prove_commit("here", str(copy), ["--spec", "dsv3"], steps=3)
    checks = {check.name: check for check in report.checks}
    used, gate, alike = (checks[key] for key in ("new version is what ran", "NaN gate", "losses and norms"))
    assert used.holds and "dsv3_megatron" in used.detail
    if name == "nothing":
        assert report.word == "proved" and alike.worst == 0
    elif name == "norms":
        assert report.word == "refuted" and gate.holds and 1e-5 < alike.worst < 0.5
    else:
        assert report.word == "refuted" and gate.holds is False and "new, step 2: " in gate.detail


def test_the_gate_for_what_is_not_a_number():
    from dsv3_megatron.prove.commit import _alike, _finite
    from dsv3_megatron.prove.report import Report
    from dsv3_megatron.prove.runs import Recorded

    good = Recorded([{"lm loss": 1.0, "grad_norm": 1.0, "skipped": 0}], None)
    for bad in ({"lm loss": float("nan")}, {"grad_norm": float("inf")}, {"skipped": 1}):
        other = Recorded([good.steps[0] | bad], None)
        assert (
            _finite({"old": good, "new": other}).holds is False and _finite({"old": good, "new": good}).holds
        )
        assert not _alike(good, other, 1, 1e-5, Report("commit", "")).holds
        assert "new, step 1: " in _finite({"old": good, "new": other}).detail
