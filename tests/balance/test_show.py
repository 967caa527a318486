"""`dsv3 balance`: what it reads, what it prints, what it refuses."""

import json

import pytest

from dsv3_megatron.balance.logged import read_load
from dsv3_megatron.balance.show import main
from tests.balance.test_eplb import PUBLISHED


@pytest.fixture
def log(tmp_path):
    """Two records whose sum is the published example, between others without layers."""
    path = tmp_path / "metrics.jsonl"
    first = [[count // 3 for count in layer] for layer in PUBLISHED]
    second = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(PUBLISHED, first, strict=True)]
    lines = [json.dumps({"iteration": 1, "lm_loss": 2.0})]
    for counts in (first, second):
        layers = {str(n): {"dead": 0, "tokens_per_expert": c} for n, c in zip((3, 61), counts, strict=True)}
        lines.append(json.dumps({"iteration": 2, "layers": layers, "expert_groups": 4}))
    path.write_text("\n".join(lines) + "\n")
    return path


def words(log, *more: str) -> list[str]:
    return ["--load", str(log), "--gpus", "8", "--nodes", "2", "--replicas", "16", *more]


def test_json_is_the_published_plan_on_one_line(log, capsys):
    main(words(log, "output=json"))
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (plan["policy"], plan["groups"], plan["replicas"]) == ("hierarchical", 4, 16)
    layer = plan["layers"]["3"]
    assert layer["phy2log"] == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    assert layer["log2phy"][1] == [15, 13] and layer["logcnt"][10] == 2
    # 12 experts do not lie evenly on 8 GPUs, so before, the first four are there twice: GPU 0 has halves of 0 and 1.
    assert layer["gpu_load_before"][0] == pytest.approx((90 + 132) / 2)
    assert layer["gpu_load_after"] == pytest.approx(
        [165 / 2 + 39, 165 / 2 + 4, 73 + 52, 61 + 52, 91.5 + 56, 91.5 + 40, 90 + 66, 86 + 66]
    )
    assert (
        sum(layer["gpu_load_after"])
        == pytest.approx(sum(PUBLISHED[0]))
        == pytest.approx(sum(layer["gpu_load_before"]))
    )
    mean = sum(PUBLISHED[0]) / 8
    assert layer["max_over_mean_after"] == pytest.approx(156 / mean)
    assert plan["max_over_mean_after"] == max(each["max_over_mean_after"] for each in plan["layers"].values())


def test_table_picture_and_options(log, tmp_path, capsys):
    main(words(log))
    lines = capsys.readouterr().out.splitlines()
    assert "16 slots on 8 GPUs in 2 nodes, 4 expert groups: hierarchical policy" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["3", "61"]
    main(words(log, "--groups", "3"))
    assert "global" in capsys.readouterr().out
    picture = tmp_path / "new" / "plan.png"
    main(words(log, "output=png", "--file", str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    load, groups = read_load(log, last=1)
    assert groups == 4 and load[3][0] == 60 and read_load(log)[0][3][0] == 90


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["output=svg"], "output=svg: use output=json or output=table or output=png"),
        (["--replicas", "17"], "--replicas 17 --groups 4: num_replicas=17 is not a multiple of num_gpus=8"),
        (["--load", "/nowhere/metrics.jsonl"], "--load /nowhere/metrics.jsonl: No such file"),
        (["--load", __file__], "line 1: not a metrics.jsonl"),
        (["--replicas", "8"], "num_replicas=8 is fewer than the 12 experts"),
        (["--nodes", "0"], "argument --nodes: 0 is not a count: give 1 or more"),
        (["--replicas", "x"], "argument --replicas: x is not a count"),
        (
            ["--nodes", "3", "--groups", "1"],
            "--nodes 3: 8 GPUs do not lie evenly on them: use a divisor of --gpus",
        ),
        (["--nodes", "16"], "--nodes 16: 8 GPUs do not lie evenly on them"),
        (
            ["--replicas", "104"],
            "--replicas 104: more than a copy of each of 12 experts on each of 8 GPUs: use 96",
        ),
        (["--replicas", "8" + "0" * 18], "argument --replicas: 8000000000000000000 is too many"),
        (["--gpus", "9" * 5000], "99999999999999999999 is too many: give 1000000 or fewer"),
        (["--output", "json"], "unrecognized arguments: --output json"),
        (["output=json", "--file", "plan.png"], "--file plan.png: output=json goes to the terminal"),
        (["output=png", "--file", "plan.txt"], "--file plan.txt: the picture is a PNG"),
        (["output=png", "--file", "x" * 300 + ".png"], "x.png: File name too long"),
        (["output=png", "--file", "/proc/nowhere/plan.png"], "--file /proc/nowhere/plan.png: "),
    ],
)
def test_refusals_are_one_line(log, change, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words(log, *change))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


def layers(counts, **more):
    return {"layers": {"3": {"tokens_per_expert": counts}}, **more}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"iteration": 1}], "no record with MoE layers"),
        ([[1, 2], [3, 4]], "line 1: not a metrics.jsonl of the trainer: no record"),
        ([5], "line 1: not a metrics.jsonl of the trainer: no record"),
        ([{"layers": [[1, 2], [3, 4]]}], 'line 1: "layers" is no table'),
        ([{"layers": {"3": [1, 2]}}], "entry '3' that is no layer by its number"),
        ([{"layers": {"a": {"tokens_per_expert": [1]}}}], "entry 'a' that is no layer by its number"),
        ([{"layers": {"9" * 5000: {"tokens_per_expert": [1]}}}], "that is no layer by its number"),
        ([{"layers": {"3": {"dead": 0}}}], "no tokens_per_expert in layer 3"),
        ([layers(4)], "tokens_per_expert of layer 3 is no list of counts"),
        ([layers([])], "tokens_per_expert of layer 3 is no list of counts"),
        ([layers([[1, 2], [3, 4]])], "expert 0 of layer 3 has [1, 2] tokens"),
        ([layers([1, None])], "expert 1 of layer 3 has None tokens"),
        ([layers([True, 1])], "expert 0 of layer 3 has True tokens"),
        ([layers([1, 2]), layers([1, -1])], "line 2: expert 1 of layer 3 has -1 tokens"),
        ([layers([1, float("nan")])], "expert 1 of layer 3 has nan tokens"),
        ([layers([1, 10**400])], "expert 1 of layer 3 has 1000"),
        ([layers([1, 2]), layers([1, 2, 3])], "line 2: 3 experts in layer 3, others have 2"),
        ([layers([1, 2], expert_groups="two")], "expert_groups 'two' is no count: use --groups N"),
        (
            [layers([1, 2], expert_groups=1), layers([1, 2], expert_groups=2)],
            "runs with [1, 2] expert groups",
        ),
    ],
)
def test_files_without_loads(tmp_path, records, message, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as stopped:
        main(["--load", str(path), "--gpus", "1"])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and f"--load {path}" in error and message in error and "\n" not in error


def test_a_line_that_was_cut_off_is_named_and_groups_can_be_said(log, tmp_path, capsys):
    cut = tmp_path / "cut.jsonl"
    cut.write_text(log.read_text() + '{"iteration": 3, "lay')
    with pytest.raises(SystemExit):
        main(words(cut))
    assert "line 4: not a metrics.jsonl of the trainer: no JSON (cut off" in capsys.readouterr().err
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(layers([1, 2], expert_groups=n)) + "\n" for n in (1, 2)))
    assert read_load(mixed, groups=2) == ({3: [2, 4]}, 2)


def test_a_layer_that_would_get_fuller_is_named(tmp_path, capsys):
    """Greedy packing: 3 + 2 + 2 and 5 + 1 + 1 in their order; the heaviest first, 5 + 2 + 1."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"layers": {"7": {"tokens_per_expert": [5, 1, 1, 3, 2, 2]}}}) + "\n")
    main(["--load", str(path), "--gpus", "2"])
    assert "layer 7: better as before" in capsys.readouterr().out.splitlines()[-1]
