"""`python -m dsv3_megatron.fp8.kernels.compile` (`make kernels`): compile every kernel for sm_90, without a GPU.

Each case calls a function of this package on tensors of the meta device, at DeepSeek-V3's sizes, and compiles the
launches that come of it. The table has a line per binary: registers and spilled bytes per thread, shared memory per
block, FP8 wgmma instructions, and the cases that use it. A second table says for each kernel what its largest case must
move and multiply, and the least time that an H100 needs for it (`roofline.py`). The last line is both as JSON. Exit
status 1 when a kernel spills, needs more shared memory than Hopper has, or is a product without FP8 wgmma. Cubins, PTX
and Triton's cache go to runs/kernels.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3_megatron.errors import Parser
from dsv3_megatron.fp8.kernels import roofline
from dsv3_megatron.fp8.kernels.cases import Case, v3_cases
from dsv3_megatron.fp8.kernels.launch import Launch, is_interpreted
from dsv3_megatron.fp8.kernels.resources import Resources, read_resources

SM_90 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HEADER = f"{'kernel':<26} {'registers':>9} {'spills':>6} {'shared':>7} {'wgmma':>5}  used by"


@dataclass
class Binary:
    """A compiled kernel and the cases that launch it."""

    kernel: str
    resources: Resources
    cases: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        r, more = self.resources, len(self.cases) - 1
        used_by = self.cases[0] + (f" and {more} more" if more else "")
        return f"{self.kernel:<26} {r.registers:>9} {r.spill_bytes:>6} {r.shared_bytes:>7} {r.fp8_wgmma:>5}  {used_by}"

    def as_dict(self) -> dict[str, object]:
        return {
            "kernel": self.kernel,
            **asdict(self.resources),
            "cases": self.cases,
            "problems": self.problems,
        }


def main(argv: Sequence[str] | None = None, cases: Iterable[Case] | None = None) -> int:
    """Compile `cases`, by default V3's; 0 when every kernel may ship, else 1."""
    parser = Parser(
        prog="python -m dsv3_megatron.fp8.kernels.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases of which name or function contain TEXT"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/kernels"), help="default runs/kernels")
    options = parser.parse_args(argv)
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter's kernels cannot be compiled")
    all_cases = list(v3_cases() if cases is None else cases)
    chosen = [case for case in all_cases if options.only in case.name or options.only in case.function]
    if not chosen:
        begins = dict.fromkeys(case.name.split()[0] for case in all_cases)
        functions = dict.fromkeys(case.function for case in all_cases)
        parser.error(
            f"--only {options.only}: no such case; use a part of one of {', '.join([*functions, *begins])}"
        )
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir {options.output_dir}: {error.strerror}; use another folder")
    with _writing_to(options.output_dir):
        binaries = compile_cases(chosen, options.output_dir)
    rooflines = roofline.per_kernel(chosen)
    print(HEADER, *(binary.line() for binary in binaries), sep="\n")
    print("", *roofline.table(rooflines), sep="\n")
    problems = [f"{b.kernel} ({b.cases[0]}) {text}" for b in binaries for text in b.problems]
    for text in problems:
        print(f"error: {text}", file=sys.stderr)
    floors = [{"kernel": k, **asdict(r), "floor_us": round(r.floor_us, 2)} for k, r in rooflines.items()]
    report = {
        "target": "sm_90",
        "ok": not problems,
        "kernels": [b.as_dict() for b in binaries],
        "roofline": floors,
    }
    print(json.dumps(report))
    return 1 if problems else 0


def compile_cases(cases: Sequence[Case], output_dir: Path) -> list[Binary]:
    """Compile all launches of `cases`, with progress on stderr; one entry per distinct binary."""
    binaries: dict[str, Binary] = {}
    for number, case in enumerate(cases, 1):
        _, launches = roofline.of(case)
        if not launches:
            raise RuntimeError(f"{case.name} launches nothing: there is nothing to compile")
        for planned in launches:
            key, cubin = compile_launch(planned, output_dir)
            if key not in binaries:
                binaries[key] = Binary(planned.name, read_resources(cubin))
                print(f"[{number}/{len(cases)}] {planned.name} for {case.name}", file=sys.stderr, flush=True)
            binaries[key].cases.append(case.name)
            binaries[key].problems = binaries[key].resources.problems(case.expects_wgmma)
    return list(binaries.values())


def compile_launch(planned: Launch, output_dir: Path) -> tuple[str, Path]:
    """Compile one launch for sm_90; returns what identifies the binary, and its cubin (.ptx and .json beside it)."""
    compiled = triton.compile(
        _source(planned),
        target=SM_90,
        options={"num_warps": planned.num_warps, "num_stages": planned.num_stages},
    )
    cubin = output_dir / f"{planned.kernel.__name__.strip('_')}-{compiled.hash[:12]}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cubin.with_suffix(".ptx").write_text(compiled.asm["ptx"])
    cubin.with_suffix(".json").write_text(json.dumps({"shared": compiled.metadata.shared}))
    return compiled.hash, cubin


def _source(planned: Launch) -> ASTSource:
    """The kernel with its arguments specialised as Triton does at a launch: ones, and multiples of 16."""
    signature: dict[str, str] = dict.fromkeys(planned.constants, "constexpr")
    constants, attributes = dict(planned.constants), {}
    parameters = planned.kernel.params
    for position, (parameter, value) in enumerate(zip(parameters, planned.args, strict=False)):
        name, specialize = parameter.name, not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if divisible and specialize:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(planned.kernel, {p.name: signature[p.name] for p in parameters}, constants, attributes)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Triton's cache and everybody's temporary files in `folder` too, and nothing elsewhere."""
    before = tempfile.tempdir, os.environ.get("TRITON_CACHE_DIR")
    for name in ("cache", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str((folder / "tmp").resolve())
    os.environ["TRITON_CACHE_DIR"] = str((folder / "cache").resolve())
    try:
        yield
    finally:
        tempfile.tempdir = before[0]
        if before[1] is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before[1]


if __name__ == "__main__":
    sys.exit(main())
