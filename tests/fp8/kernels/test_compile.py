"""`make kernels`: what it compiles, what it prints, and that it fails when it should."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dsv3_megatron.fp8.kernels import compile as compiler
from dsv3_megatron.fp8.kernels import gemm, quantize_tile
from dsv3_megatron.fp8.kernels.cases import Case, blocked, matrix, tiled, v3_cases

PRODUCT = Case("product", partial(gemm.gemm_nt, tiled(4096, 7168), blocked(1536, 7168)), expects_wgmma=True)


def run(arguments: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], dict]:
    """The command in a process whose home is `folder`/home."""
    (folder / "home").mkdir()
    command = [sys.executable, "-m", "dsv3_megatron.fp8.kernels.compile", "--output-dir", str(folder / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "home")}
    result = subprocess.run(
        command + arguments, capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    return result, json.loads(result.stdout.splitlines()[-1])


def report(capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    """The JSON line, and stderr."""
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_products_use_fp8_wgmma(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        case for case in v3_cases() if case.name in ("q_down fprop", "expert_fc1 grouped fprop", "q_up wgrad")
    ]
    assert len(cases) == 3
    assert compiler.main(["--output-dir", str(tmp_path)], cases) == 0
    found, _ = report(capsys)
    assert found["ok"] and {row["kernel"] for row in found["kernels"]} == {"gemm", "grouped_gemm"}
    for row in found["kernels"]:
        # One 128-wide tile of K is four instructions of 32.
        assert row["fp8_wgmma"] == 4 and row["spill_bytes"] == 0 and 0 < row["registers"] <= 255, row
    ptx = [path.read_text() for path in tmp_path.glob("*.ptx")]
    assert len(ptx) == 3
    for text in ptx:
        assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in text
        assert "mma.sync" not in text.replace("wgmma.mma_async.sync", "")
        # Promotion every 128: the first of the four starts from zero, the others add to it, and all are awaited.
        first, *others = re.findall(r"wgmma\.mma_async[^;]*, (0|%p\d+), 1, 1;", text)
        assert first == "0" and len(others) == 3 and all(predicate != "0" for predicate in others)
        assert "wgmma.wait_group.sync.aligned 0;" in text
        # Both operands arrive asynchronously, 16 bytes at a time: 4 loads each, before and in the loop.
        assert len(re.findall(r"cp\.async\.cg\.shared\.global.*0x10", text)) > 8


def test_quantisers_round_as_the_reference_does(tmp_path: Path) -> None:
    """IEEE division, and the hardware's conversion to nearest even, which the interpreter's tests take for granted."""
    case = Case("quantize", partial(quantize_tile, matrix(4096, 7168)))
    assert compiler.main(["--output-dir", str(tmp_path)], [case]) == 0
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "div.rn.f32" in ptx and "div.full.f32" not in ptx and ".ftz" not in ptx


def test_command_writes_only_to_its_folder(tmp_path: Path) -> None:
    result, found = run(["--only", "E5M6"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert [row["kernel"] for row in found["kernels"]] == ["pack_e5m6", "unpack_e5m6"]
    table = result.stdout.splitlines()
    assert table[0].split() == ["kernel", "registers", "spills", "shared", "wgmma", "used", "by"]
    for line, row in zip(table[1:-1], found["kernels"], strict=True):
        numbers = [row[key] for key in ("registers", "spill_bytes", "shared_bytes", "fp8_wgmma")]
        assert line.split()[:5] == [row["kernel"], *map(str, numbers)]
    assert list((tmp_path / "home").iterdir()) == []
    assert len(list((tmp_path / "out").glob("*.cubin"))) == 2


def test_a_spill_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 × 128 sums and products in half as many threads need 256 registers for these alone."""
    monkeypatch.setitem(gemm._LAUNCH, "num_warps", 4)
    assert compiler.main(["--output-dir", str(tmp_path)], [PRODUCT]) == 1
    found, errors = report(capsys)
    (row,) = found["kernels"]
    assert not found["ok"] and row["spill_bytes"] > 0
    assert f"error: gemm (product) spills {row['spill_bytes']} bytes per thread" in errors


def test_too_much_shared_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gemm._LAUNCH, "num_stages", 9)
    assert compiler.main(["--output-dir", str(tmp_path)], [PRODUCT]) == 1
    found, errors = report(capsys)
    assert found["kernels"][0]["shared_bytes"] > 227 * 1024
    assert "Hopper has 232448" in errors


def test_a_product_without_wgmma_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("no product", partial(quantize_tile, matrix(4096, 7168)), expects_wgmma=True)
    assert compiler.main(["--output-dir", str(tmp_path)], [case]) == 1
    assert "quantize_tile (no product) has no wgmma with e4m3 operands" in report(capsys)[1]


def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compiler.main(["--only", "nonesuch", "--output-dir", str(tmp_path)])
    assert "--only nonesuch: no such case" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        compiler.main(["--output-dir", str(tmp_path)])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.slow
def test_every_kernel_at_v3s_sizes(tmp_path: Path) -> None:
    result, found = run([], tmp_path)
    assert result.returncode == 0, result.stderr
    assert {row["kernel"] for row in found["kernels"]} == {
        "quantize_tile",
        "quantize_tile_t",
        "quantize_block",
        "requantize_transposed",
        "pack_e5m6",
        "unpack_e5m6",
        "swiglu",
        "swiglu_backward",
        "gemm",
        "grouped_gemm",
    }
    for row in found["kernels"]:
        assert row["spill_bytes"] == 0 and row["shared_bytes"] <= 227 * 1024 and not row["problems"], row
        assert (row["fp8_wgmma"] > 0) == ("gemm" in row["kernel"]), row
