"""`dsv3 prove --hf --megatron`: the same model is proved; a swapped tensor, router or MTP projection is not."""

import getpass
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_megatron.convert.to_hf import MegatronWeights
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.prove.__main__ import main
from tests.convert.releases import micro, release, to_fp8

DOWN = "model.layers.0.mlp.down_proj.weight"
CHECKS = ["inventory", "tensors", "logits", "MTP logits", "router decisions"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    release(folder / "hf", micro(), mtp=True)
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder / "hf", folder / "megatron"


def prove(hf, megatron, output, capsys, *more) -> tuple[int, dict]:
    status = main(["--hf", str(hf), "--megatron", str(megatron), "--output", str(output), "--json", *more])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_same_model(pair, tmp_path, capsys):
    status, report = prove(*pair, tmp_path / "report", capsys)
    assert (status, report["word"]) == (0, "proved"), report
    checks = {check["name"]: check for check in report["checks"]}
    assert list(checks) == CHECKS and all(check["holds"] and check["count"] for check in checks.values())
    assert (
        checks["tensors"]["worst"] == 0 and checks["logits"]["worst"] < 1e-5 > checks["MTP logits"]["worst"]
    )
    # Two MoE layers of three, and MTP's.
    tokens = sum(report["settings"]["tokens"])
    assert checks["router decisions"]["count"] == 3 * tokens - len(report["settings"]["tokens"])
    # One folder, no weights, no paths, no machine.
    files = {file.name: file.read_text() for file in (tmp_path / "report").iterdir()}
    assert files.keys() == {"report.json", "report.md", "tensors.json"}
    home, user, machine = Path.home(), getpass.getuser(), socket.gethostname()
    for text in files.values():
        for place in (tmp_path, pair[0], pair[1], Path.cwd(), home, Path(__file__).parents[2]):
            assert not re.search(rf"(?<!\w){re.escape(str(place))}(?!\w)", text), place
        for name in (user, machine):
            assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), name
    assert (
        json.loads(files["report.json"])["word"] == "proved" and "# checkpoint: proved" in files["report.md"]
    )
    rows = json.loads(files["tensors.json"])
    assert len(rows) == checks["tensors"]["count"] and all(
        row["sha256_hf"] == row["sha256_megatron"] for row in rows
    )


@pytest.mark.slow
def test_a_bf16_checkpoint_of_an_fp8_release(pair, tmp_path, capsys):
    """Its products are rounded to BF16, and so are they on the other side."""
    hf = tmp_path / "hf"
    shutil.copytree(pair[0], hf)
    to_fp8(hf)
    hf_to_megatron(hf, tmp_path / "megatron")
    status, report = prove(hf, tmp_path / "megatron", tmp_path / "report", capsys)
    assert (status, report["word"]) == (0, "proved"), report["checks"]
    assert MegatronWeights(tmp_path / "megatron").dtype(DOWN) == torch.bfloat16
    # Another model's: the same release without FP8.
    status, report = prove(pair[0], tmp_path / "megatron", tmp_path / "other", capsys)
    assert (status, report["word"]) == (1, "refuted")


def spoiled(hf: Path, folder: Path, change) -> Path:
    folder.mkdir()
    for file in hf.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shards = {file: load_file(file) for file in folder.glob("*.safetensors")}
    everything = {name: value for shard in shards.values() for name, value in shard.items()}
    change(everything)
    for file, shard in shards.items():
        kept = {name: everything[name] for name in shard if name in everything}
        save_file(kept, file, metadata={"format": "pt"})
    return folder


def swap(tensors) -> None:
    a, b = (f"model.layers.1.mlp.experts.{n}.up_proj.weight" for n in (0, 1))
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()


def halves(tensors) -> None:
    name = "model.layers.3.eh_proj.weight"
    tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, 1)


def bias(tensors) -> None:
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"] = torch.arange(8).float()


def drop(tensors) -> None:
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight"]


@pytest.mark.parametrize(
    "change, failing",
    [
        (swap, {"tensors"}),
        pytest.param(swap, {"tensors", "logits", "MTP logits"}, marks=pytest.mark.slow),
        pytest.param(halves, {"tensors", "MTP logits"}, marks=pytest.mark.slow),
        pytest.param(bias, {"tensors", "logits", "MTP logits", "router decisions"}, marks=pytest.mark.slow),
        (drop, {"inventory"}),
    ],
)
def test_controls(pair, tmp_path, capsys, change, failing):
    """Each change is seen by the checks that should see it."""
    hf = spoiled(pair[0], tmp_path / "spoiled", change)
    more = ["--no-logits"] if failing == {"tensors"} else []
    status, report = prove(hf, pair[1], tmp_path / "report", capsys, *more)
    assert (status, report["word"]) == (1, "refuted")
    failed = {check["name"] for check in report["checks"] if check["holds"] is False}
    assert failed >= failing and (change is not halves or "logits" not in failed), report["checks"]


def test_an_interrupted_audit_goes_on_and_without_logits_it_is_incomplete(
    pair, tmp_path, capsys, monkeypatch
):
    from dsv3_megatron.prove import checkpoint

    compared = []
    digest = checkpoint.digest

    def stop(value):
        compared.append(value)
        if len(compared) == 41:  # in the 21st tensor
            raise KeyboardInterrupt
        return digest(value)

    monkeypatch.setattr(checkpoint, "digest", stop)
    words = [
        "--hf",
        str(pair[0]),
        "--megatron",
        str(pair[1]),
        "--output",
        str(tmp_path / "report"),
        "--no-logits",
    ]
    assert main(words) == 130 and "goes on" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    status, report = prove(*pair, tmp_path / "report", capsys, "--no-logits")
    tensors = report["checks"][1]
    assert len(compared) == 41 + 2 * (tensors["count"] - 20) and not (tmp_path / "report.part.jsonl").exists()
    assert (status, report["word"]) == (1, "incomplete")
    assert [check["holds"] for check in report["checks"]] == [True, True, None, None, None]


def test_with_json_nothing_else_is_on_stdout(pair, tmp_path, capsys, monkeypatch):
    """Megatron's logger writes there once it builds a model."""
    from dsv3_megatron.prove import checkpoint

    digest = checkpoint.digest
    monkeypatch.setattr(checkpoint, "digest", lambda value: print("WARNING") or digest(value))
    sides = ["--hf", str(pair[0]), "--megatron", str(pair[1]), "--output", str(tmp_path / "report")]
    main([*sides, "--no-logits", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["word"] == "incomplete"


def test_what_is_no_model_is_no_side(pair, tmp_path, capsys):
    """One line with the option, before anything is compared; a model that lacks a tensor is refuted instead."""
    (tmp_path / "empty").mkdir()
    spoilt = {
        "listed": ("config.json", "[]"), "llama": ("config.json", '{"model_type": "llama"}'),
        "tracker": ("latest_checkpointed_iteration.txt", "abc"), "words": ("tokenizer.json", "{}"),
    }  # fmt: skip
    for name, (file, text) in spoilt.items():
        shutil.copytree(pair[name == "tracker"], tmp_path / name)
        (tmp_path / name / file).write_text(text)
    for hf, megatron, said in (
        ("empty", pair[1], "--hf "),
        ("listed", pair[1], "config.json: not a JSON object"),
        ("llama", pair[1], "model_type='llama'"),
        (pair[0], "empty", "no Megatron checkpoint"),
        (pair[0], "tracker", "'abc' is neither an iteration nor release"),
        ("words", pair[1], "tokenizer.json: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "--hf",
                    str(tmp_path / hf),
                    "--megatron",
                    str(tmp_path / megatron),
                    "--output",
                    str(tmp_path / "x"),
                ]
            )
        *_, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ") and said in line, line
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hf", "nowhere", "--megatron", "."], "--hf nowhere: no such folder"),
        (["--hf", "."], "--megatron"),
        (["resum"], "dsv3 prove resum: give --hf"),
        (["--hf", ".", "--megatron", ".", "--positions", "a"], "--positions: a: give whole numbers"),
        (["--hf", ".", "--megatron", ".", "--output", "/proc/a/b"], "--output /proc/a/b: No such file"),
        (["--hf", ".", "--megatron", ".", "--output", "tests"], "--output tests: is there already"),
    ],
)
def test_wrong_words(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
