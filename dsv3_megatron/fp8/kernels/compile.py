"""`python -m dsv3_megatron.fp8.kernels.compile` (`make kernels`): compile every kernel for sm_90, without a GPU.

Each case calls a function of this package on tensors of the meta device, at DeepSeek-V3's sizes, and compiles the
launches that come of it. The table has registers and spilled bytes per thread and shared memory per block; the last
line is the same as JSON. Exit status 1 when a kernel spills, needs more shared memory than Hopper has, or is a
product without FP8 wgmma. Cubins, PTX and Triton's cache go to runs/kernels.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3_megatron.fp8.kernels.cases import CASES, Case
from dsv3_megatron.fp8.kernels.launch import Launch, recording
from dsv3_megatron.fp8.kernels.resources import Resources, read_resources

SM_90 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Compile `cases`; 0 when every kernel may ship, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.fp8.kernels.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/kernels"), help="default runs/kernels")
    options = parser.parse_args(argv)
    chosen = [case for case in cases if options.only in case.name]
    if not chosen:
        parser.error(f"--only {options.only}: use a part of one of {', '.join(case.name for case in cases)}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter's kernels cannot be compiled")
    _keep_writes_in(options.output_dir)
    print(f"{'case':<44} {'kernel':<34} {'registers':>9} {'spills':>6} {'shared':>7} {'wgmma':>5} {'s':>5}")
    rows = [row for case in chosen for row in compile_case(case, options.output_dir)]
    problems = [f"{row['case']}, {row['kernel']}: {text}" for row in rows for text in row["problems"]]
    for text in problems:
        print(f"error: {text}", file=sys.stderr)
    print(json.dumps({"target": "sm_90", "ok": not problems, "kernels": rows}))
    return 1 if problems else 0


def compile_case(case: Case, output_dir: Path) -> list[dict[str, Any]]:
    """Compile the launches of one case and print their lines.

    Returns:
        Per launch: case, kernel, registers (per thread), spill_bytes (per thread), shared_bytes (per block),
        fp8_wgmma (instructions), problems.
    """
    launches: list[Launch] = []
    with recording(launches.append):
        case.call()
    if not launches:
        raise RuntimeError(f"{case.name} launched nothing")
    rows = []
    for planned in launches:
        began = time.monotonic()
        used = compile_launch(
            planned, output_dir / f"{case.name}-{planned.kernel.__name__}".replace(" ", "_")
        )
        row = {"case": case.name, "kernel": planned.kernel.__name__, **asdict(used)}
        rows.append({**row, "problems": used.problems(case.expects_wgmma)})
        print(
            f"{case.name:<44} {planned.kernel.__name__:<34} {used.registers:>9} {used.spill_bytes:>6} "
            f"{used.shared_bytes:>7} {used.fp8_wgmma:>5} {time.monotonic() - began:>5.1f}",
            flush=True,
        )
    return rows


def compile_launch(planned: Launch, stem: Path) -> Resources:
    """Compile one launch for sm_90, with Triton's own specialisation of its arguments; writes stem.cubin and .ptx."""
    names = planned.kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(planned.constants, "constexpr")
    constants, attributes = dict(planned.constants), {}
    for position, (name, value) in enumerate(zip(names, planned.args, strict=False)):
        if isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        signature[name] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in names}
    source = ASTSource(planned.kernel, signature, constants, attributes)
    options = {"num_warps": planned.num_warps, "num_stages": planned.num_stages}
    compiled = triton.compile(source, target=SM_90, options=options)
    cubin = stem.with_suffix(".cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    stem.with_suffix(".ptx").write_text(compiled.asm["ptx"])
    return read_resources(cubin, compiled.metadata.shared, compiled.asm["ptx"])


def _type(value: torch.Tensor | int | float) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _keep_writes_in(folder: Path) -> None:
    """Triton's cache and everybody's temporary files too."""
    for name in ("cache", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str((folder / "cache").resolve())
    tempfile.tempdir = str((folder / "tmp").resolve())


if __name__ == "__main__":
    sys.exit(main())
