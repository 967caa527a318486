"""What `dsv3 plan` says of the plan itself: refused by name where it would do nothing, said where it does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_megatron.plan import __main__ as command
from dsv3_megatron.plan import pictures, report, whatif
from dsv3_megatron.plan.confidence import confidence
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.options import beside_job, parse
from dsv3_megatron.plan.published import RUNS
from tests.plan.test_command import PLAIN, PUBLISHED, _small_plan

BF16 = next(run for run in RUNS if run.name == "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 8 microbatches")
FP8 = next(run for run in RUNS if run.name.startswith("1024 H100, FP8 blockwise"))


def _refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line."""
    with pytest.raises(SystemExit) as exit_:
        command.main(words)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and not out and "Traceback" not in err
    return err.strip().splitlines()[-1]


# --- pictures


def _unwritable(tmp_path: Path, kind: str) -> Path:
    if kind == "kernel":
        return Path("/sys")  # nobody makes a file there, root neither
    (tmp_path / kind).mkdir()
    return tmp_path


@pytest.mark.parametrize("kind", ["kernel", "timeline.svg", "memory.png", "timeline.json"])
def test_a_place_that_cannot_be_written_is_refused_before_planning(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "planned_of", lambda options: pytest.fail("planned first"))
    place = _unwritable(tmp_path, kind)
    assert f"pictures={place}: " in _refused([*PUBLISHED, f"pictures={place}"], capsys)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "timeline.svg").write_text("earlier")
    (tmp_path / "overlay.png").mkdir()  # written with measured= alone
    pictures.make_place(tmp_path)
    assert (tmp_path / "timeline.svg").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overlay.png", "timeline.svg"]
    with pytest.raises(ValueError, match=r"pictures=.*overlay\.png"):
        pictures.make_place(tmp_path, Path("measured.json"))


def test_a_disk_that_fills_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside `test_command.test_pictures`, which sees that all of them are written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "draw", full)
    with pytest.raises(ValueError, match=r"pictures=.*No space left"):
        pictures.write_all(_small_plan(), tmp_path)


# --- cost


def test_json_has_the_cost_of_the_table(capsys: pytest.CaptureFixture) -> None:
    command.main([*PUBLISHED, "tokens=1e12", "price=3", "output=json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    cost = found["cost"]
    assert cost["tokens"] == 1e12 and cost["dollars_per_gpu_hour"] == 3
    assert cost["gpu_hours"] == pytest.approx(found["gpu_hours_per_1t"])
    assert cost["days"] == pytest.approx(found["days_per_1t"])
    assert cost["dollars"] == pytest.approx(3 * found["gpu_hours_per_1t"])
    command.main([*PUBLISHED, "tokens=1e12"])  # at DeepSeek's price
    assert f"${2 * cost['gpu_hours'] / 1e6:.3f}M at $2 per" in capsys.readouterr().out


# --- words that would do nothing


@pytest.mark.parametrize(
    "words, expected",
    [
        (["price=3"], "price=3 without tokens="),
        (["--proxy", "tokens=1e12"], "--proxy with tokens="),
        (["--proxy", "tokens=1e12", "price=1"], "--proxy with tokens=, price="),
        (["--proxy", "whatif=all"], "--proxy with whatif="),
        (["--proxy", "pictures=none"], "--proxy with pictures="),
        (["--proxy", f"anchor={__file__}"], "--proxy with anchor="),
        (["--proxy=true"], "--proxy takes no value"),
        (["--proxy=false"], "--proxy takes no value"),
        (["whatif=[all, none]"], "whatif=all,none: no such change"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_word_that_does_nothing_is_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert expected in _refused([*PUBLISHED, *words], capsys)
    assert not Path("none").exists()


def test_lists_may_have_spaces() -> None:
    assert parse(["whatif=[a, b ]"]).whatif == parse(["whatif=a,b"]).whatif == ("a", "b")
    assert parse(["software.graphs=[attn, mlp]"]).software["graphs"] == {"attn", "mlp"}


def test_what_describes_the_job_goes_with_a_proxy() -> None:
    options = parse(["--proxy", "load_imbalance=1", "software.te=2.9", "model=x"])
    assert beside_job(options) == ["--proxy"] and options.of_run == ["load_imbalance=1", "software.te=2.9"]


@pytest.mark.parametrize("name", ["fp8_attention", "norm_quantises"])
def test_software_of_fp8_needs_fp8(name: str, capsys: pytest.CaptureFixture) -> None:
    assert f"software.{name}=true: the job has no FP8 (bf16)" in _refused(
        [*PLAIN, f"software.{name}=true"], capsys
    )
    planned = command.planned_of(parse([*PLAIN, f"software.{name}=false"]))
    assert not planned.job.precision.fp8_attention


@pytest.mark.parametrize(
    "said, expected",
    [
        ({"plan": ["model=nope"], "step_s": 1}, "model=nope"),
        ({"plan": [], "step_s": 1}, ""),
        ({"launch": "torchrun nonsense", "step_s": 1}, "nonsense"),
        ({"launch": "torchrun pretrain_gpt.py", "step_s": 1, "colour": "red"}, "colour=red"),
        ({"plan": PUBLISHED, "step_s": 1, "gpu": "h100"}, "gpu is no key beside plan"),
        ({"plan": PUBLISHED, "launch": "torchrun", "step_s": 1}, "plan and launch are both there"),
        ({"plan": [*PUBLISHED, "output=json"], "step_s": 1}, "output= among the words"),
        ({"plan": PUBLISHED, "step_s": 1000}, "more than 4 times off its plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_in_an_anchor_names_its_file(
    said: dict, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(said))
    line = _refused([*PUBLISHED, f"anchor={file}"], capsys)
    assert line.count(f"anchor={file}: ") == 1 and expected in line


@pytest.mark.parametrize(
    "word", ["tokens=1e12", "pictures=none", f"anchor={__file__}", "--proxy", "whatif=all"]
)
def test_words_of_an_anchor_describe_its_job_alone(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^{word.partition('=')[0]}.* among the words of the measured job"):
        command._measured_job([*PUBLISHED, word])
    assert not Path("none").exists()


# --- what a job does not have


def _dense(job: Job) -> Job:
    sizes = replace(job.sizes, num_moe_layers=0, num_moe_experts=0)
    stages = tuple(replace(stage, dense=stage.dense + stage.moe, moe=0) for stage in job.stages)
    assert isinstance(stages[0], Stage)
    return replace(job, sizes=sizes, stages=stages, layout=replace(job.layout, ep=1))


def test_what_if_says_that_a_job_has_no_fp8() -> None:
    for run, without in ((BF16, 4), (FP8, 0)):
        found = whatif.what_if(whatif.names_of(["all"]), run.job, GPUS[run.gpu], run.counts)
        assert sum("no FP8" in one.reason for one in found) == without
        assert [one.name for one in found] == [*whatif.REASONS, "together"]
        assert len({one.step_s for one in found if "no FP8" in one.reason}) <= 1
    assert "no dispatch" in whatif.reason_of("communication_coprocessor", _dense(BF16.job))
    assert "no dispatch" not in whatif.reason_of("communication_coprocessor", BF16.job)


def test_a_dense_model_has_no_dispatcher_and_no_experts_to_recompute() -> None:
    dense = _dense(FP8.job)
    assert "alltoall" not in str(confidence(dense, GPUS["h100"])) and "no experts" in str(
        confidence(dense, GPUS["h100"])
    )
    assert "deepep" in str(confidence(replace(FP8.job, global_batch_size=2**20), GPUS["h200"]))
    for job, offered in ((dense, False), (FP8.job, True)):
        words = [change for change, _ in report._changes(job)]
        assert any("moe" in word or "expert" in word for word in words) == offered
        assert any("mla_up_proj" in word for word in words) and len(words) == len(set(words))
