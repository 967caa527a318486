"""`dsv3 prove fp8`: a model within FP8's bounds, one with a doubled scale, one that was trained in FP8."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dsv3_megatron.convert.to_hf import MegatronWeights
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.fp8.precision import factory_of
from dsv3_megatron.prove.__main__ import main
from dsv3_megatron.prove.fp8 import prove_fp8
from tests.convert.releases import micro, release


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    release(folder, micro(), mtp=True, dtype=torch.bfloat16)
    return folder


def proved(words, output, capsys) -> tuple[dict, dict]:
    """The checks and the settings of a report that is proved; random routers are near ties, hence the bound."""
    status = main(["fp8", *map(str, words), "--output", str(output), "--json", "--bound", "0.5"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    checks = {check["name"]: check for check in report["checks"]}
    assert (status, report["word"]) == (0, "proved"), checks
    return checks, report["settings"]


def test_within_its_bounds(hf, tmp_path, capsys):
    before = {file.name for file in hf.parent.iterdir()}
    checks, settings = proved(["--hf", hf], tmp_path / "report", capsys)
    # E4M3 comes near its bound, and not over it.
    assert (
        0.5 < checks["error of each element"]["worst"] <= 1 and checks["error of each element"]["count"] > 50
    )
    assert checks["tensors that stay"]["count"] > 10
    assert 1e-4 < checks["drift of the logits"]["worst"] < 0.5
    assert "drift in FP8 arithmetic" not in checks and "do not name" in settings["trained in"]
    assert {file.name for file in hf.parent.iterdir()} == before
    (row,) = json.loads((tmp_path / "report" / "drift.json").read_text())
    assert row["drift"] == checks["drift of the logits"]["worst"] and row["kl_nats"] > 0


def test_a_doubled_scale_is_refuted(hf):
    name = "model.layers.1.self_attn.o_proj.weight"
    report = prove_fp8(None, hf, logits=False, spoil=name)
    assert report.word == "refuted" and name in report.checks[0].detail


def trained(checkpoint: Path, **arguments) -> None:
    """Let a conversion's arguments be those of a training."""
    weights = MegatronWeights(checkpoint)
    found = Namespace(**(vars(weights.arguments) | {"consumed_train_samples": 1} | arguments))
    torch.save(
        {"args": found}, weights.checkpoint.path / "common.pt"
    )  # counts before what is among the tensors


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 96])
def test_a_model_trained_in_fp8_is_computed_as_it_was_trained(width, tmp_path, capsys):
    """Of widths that 128 divides, the export has the blocks that training had: there is no drift at all."""
    hf = tmp_path / "hf"
    release(hf, micro(intermediate_size=width, moe_intermediate_size=width), mtp=True, dtype=torch.bfloat16)
    for name in ("fp8", "bf16"):
        hf_to_megatron(hf, tmp_path / name)
    trained(tmp_path / "fp8", fp8_quantizer_factory=factory_of("dsv3"), bf16=True)
    trained(tmp_path / "bf16", bf16=True)
    words = ["--megatron", tmp_path / "fp8", "--beside", tmp_path / "bf16"]
    checks, settings = proved(words, tmp_path / "report", capsys)
    assert settings["trained in"] == "FP8 (dsv3)" and settings["beside it, trained in"] == "BF16"
    plain, beside = checks["drift of the logits"]["worst"], checks["drift of the logits, beside"]["worst"]
    assert plain == beside > 1e-3  # the same weights went the same way
    own = checks["drift in FP8 arithmetic"]["worst"]
    assert own < 1e-5 if width == 128 else own > 1e-3
    rows = {row["name"]: row["drift"] for row in json.loads((tmp_path / "report" / "drift.json").read_text())}
    assert len(rows) == 4 and rows["FP8 products against fp32, before the export"] > 1e-3
