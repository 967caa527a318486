"""`dsv3 prove fp8`: a model within FP8's bounds, and one with a doubled scale."""

import json
from pathlib import Path

import pytest
import torch

from dsv3_megatron.prove.__main__ import main
from dsv3_megatron.prove.fp8 import prove_fp8
from tests.convert.releases import micro, release


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    release(folder, micro(), mtp=True, dtype=torch.bfloat16)
    return folder


def test_within_its_bounds(hf, tmp_path, capsys):
    before = {file.name for file in hf.parent.iterdir()}
    status = main(
        ["fp8", "--hf", str(hf), "--output", str(tmp_path / "report"), "--json", "--bound", "0.5"]
    )  # random routers are near ties
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, report["word"]) == (0, "proved"), [
        (check["name"], check["worst"], check["holds"]) for check in report["checks"]
    ]
    checks = {check["name"]: check for check in report["checks"]}
    # E4M3 comes near its bound, and not over it.
    assert (
        0.5 < checks["error of each element"]["worst"] <= 1 and checks["error of each element"]["count"] > 50
    )
    assert checks["tensors that stay"]["count"] > 10
    assert 1e-4 < checks["drift of the logits"]["worst"] < 0.5
    assert {file.name for file in hf.parent.iterdir()} == before


def test_a_doubled_scale_is_refuted(hf):
    name = "model.layers.1.self_attn.o_proj.weight"
    report = prove_fp8(None, hf, logits=False, spoil=name)
    assert report.word == "refuted" and name in report.checks[0].detail
