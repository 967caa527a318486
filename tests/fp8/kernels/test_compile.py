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
from dsv3_megatron.fp8.kernels import gemm, quantize_tile, roofline
from dsv3_megatron.fp8.kernels.cases import Case, blocked, matrix, tiled, v3_cases

PRODUCT = Case("product", partial(gemm.gemm_nt, tiled(4096, 7168), blocked(1536, 7168)), flops=1)


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
    table = result.stdout.split("\n\n")[0].splitlines()
    assert table[0].split() == ["kernel", "registers", "spills", "shared", "wgmma", "used", "by"]
    for line, row in zip(table[1:], found["kernels"], strict=True):
        numbers = [row[key] for key in ("registers", "spill_bytes", "shared_bytes", "fp8_wgmma")]
        assert line.split()[:5] == [row["kernel"], *map(str, numbers)]
    assert list((tmp_path / "home").iterdir()) == []
    assert len(list((tmp_path / "out").glob("*.cubin"))) == 2


def test_what_only_moves_bytes_moves_many_at_a_time(tmp_path: Path) -> None:
    """Twelve-bit numbers go to memory as 32-bit words, and nothing but a message's exponents goes byte by byte."""
    chosen = [
        case for case in v3_cases() if re.search("E5M6|dispatch|DeepEP|input kept|gradients", case.name)
    ]
    assert len(chosen) == 10
    assert compiler.main(["--output-dir", str(tmp_path)], chosen) == 0
    for path in tmp_path.glob("*.ptx"):
        text = path.read_text()
        stores, loads = (re.findall(rf"{kind}\.global\S*\.(b\d+)", text) for kind in ("st", "ld"))
        assert stores and loads
        message = "encode_message" in path.name or ("dequantize" in path.name and "ld.global.b8" in text)
        assert message or "b8" not in stores + loads, path.name
        assert re.search(r"ld\.global\.v[24]\.b32", text) or "unpack_e5m6" in path.name
        assert "st.global.v" in text or "pack_e5m6" in path.name


def test_rooflines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 4096×7168 times 7168×36864 is 2.16 TFLOP, 1094 µs at 1979 TFLOPS; its bytes take 194 µs at 3 TB/s."""
    highest = roofline.per_kernel(v3_cases())
    gemm_floor = highest["gemm"]
    assert gemm_floor.flops == 2 * 4096 * 7168 * 36864 and gemm_floor.bound == "products"
    assert gemm_floor.floor_us == pytest.approx(1093.9, abs=0.1)
    rows, columns = 4096 * 8, 7168
    decode = highest["dequantize"]
    assert decode.case == "DeepEP decode" and decode.bytes == rows * columns * (1 + 4 / 128 + 2)
    assert decode.bound == "memory" and decode.floor_us == pytest.approx(decode.bytes / 3e6)
    # The experts' weights are addresses to the grouped kernel, and are counted all the same.
    sizes, (k, n) = (1501, 0, 2000, 595), (7168, 4096)
    grouped = 4 * n * k * (1 + 4 / 128**2) + sum(sizes) * k * (1 + 4 / 128) + sum(sizes) * n * 2
    (case,) = (case for case in v3_cases() if case.name == "expert_fc1 grouped fprop")
    assert roofline.of(case)[0].bytes == grouped
    assert compiler.main(["--only", "kv_down bfloat16 weight", "--output-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr().out
    assert json.loads(captured.splitlines()[-1])["roofline"][0]["bytes"] == 576 * 7168 * 3 + 5 * 56 * 4
    assert re.search(r"quantize_block +12\.4 +0 +4\.1  memory +kv_down", captured)


def test_the_page_has_the_rooflines() -> None:
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text()
    for line in roofline.table(roofline.per_kernel(v3_cases())):
        assert line in page


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
    case = Case("no product", partial(quantize_tile, matrix(4096, 7168)), flops=1)
    assert compiler.main(["--output-dir", str(tmp_path)], [case]) == 1
    assert "quantize_tile (no product) has no wgmma with e4m3 operands" in report(capsys)[1]


def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (
            ["--only", "nonesuch", "--output-dir", str(tmp_path)],
            "--only nonesuch: no such case; use a part of one of ",
        ),
        (["--only", "pack_e5m6", "--output-dir", __file__], "File exists; use another folder"),
        (["--outputdir", str(tmp_path)], "unrecognized arguments: --outputdir"),
    ):
        with pytest.raises(SystemExit, match="2"):
            compiler.main(words)
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
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
        "encode_message",
        "dequantize",
        "swiglu",
        "swiglu_backward",
        "swiglu_keep",
        "swiglu_again",
        "swiglu_gradients",
        "gemm",
        "grouped_gemm",
    }
    for row in found["kernels"]:
        assert row["spill_bytes"] == 0 and row["shared_bytes"] <= 227 * 1024 and not row["problems"], row
        assert (row["fp8_wgmma"] > 0) == ("gemm" in row["kernel"]), row
