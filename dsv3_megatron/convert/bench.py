"""Throughput and memory of both conversions beside `cp` and `sync` of the same files, in one run.

python -m dsv3_megatron.convert.bench [--folder runs/convert_bench] [--gigabytes 4] [--repeats 3]

makes a synthetic checkpoint in the form of the release (kept for the next run), then alternates between copying it and
converting it: each time into a new folder on the same disk, the source's pages in memory, and until everything written
is on disk. Each conversion runs in a process of its own, which reports its anonymous memory.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dsv3_megatron.convert.synthetic import synthetic_release

__all__ = ["main"]

# Above what the imports take: 512 MiB, and three of the largest tensor.
_FIXED_BYTES, _LARGEST_TENSORS = 512 * 2**20, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/convert_bench"))
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fp8", action="store_true", help="an FP8 checkpoint: into bf16, and back into FP8")
    parser.add_argument(
        "--measured", nargs=4, metavar=("COMMAND", "INPUT", "OUTPUT", "WORKERS"), help=argparse.SUPPRESS
    )
    parser.add_argument("--dtype", default="keep", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured:
        command, source, output, workers = options.measured
        print(json.dumps(measured(command, source, output, workers, options.dtype)))
        return
    print(json.dumps(bench(options)))


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Rates in bytes of input per second (medians), their ratio to copying, and the memory of both conversions."""
    kind = "fp8" if options.fp8 else "bf16"
    hf = options.folder / f"hf_{kind}_{options.gigabytes:g}GB"
    if not hf.exists():
        print(f"bench: writing {hf}", file=sys.stderr)
        synthetic_release(hf, options.gigabytes * 1e9, options.fp8)
    megatron, back, copy = (options.folder / name for name in ("megatron", "back", "copy"))
    rates: dict[str, list[float]] = {"cp": [], "hf_to_megatron": [], "cp_megatron": [], "megatron_to_hf": []}
    memory: dict[str, dict[str, int]] = {}
    for _ in range(options.repeats):
        for folder in (megatron, back, copy):
            shutil.rmtree(folder, ignore_errors=True)
        rates["cp"].append(_copy(hf, copy))
        memory["hf_to_megatron"] = _convert("hf-to-megatron", hf, megatron, options.workers, "keep", rates)
        rates["cp_megatron"].append(_copy(megatron / "release", copy))
        dtype = "fp8" if options.fp8 else "keep"
        memory["megatron_to_hf"] = _convert("megatron-to-hf", megatron, back, options.workers, dtype, rates)
    for folder in (megatron, back, copy):
        shutil.rmtree(folder, ignore_errors=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "input_bytes": _size(hf),
        "gb_per_s": {name: round(rate / 1e9, 3) for name, rate in median.items()},
        "of_cp": {
            "hf_to_megatron": round(median["hf_to_megatron"] / median["cp"], 3),
            "megatron_to_hf": round(median["megatron_to_hf"] / median["cp_megatron"], 3),
        },
        "anonymous_memory": memory,
    }


def measured(command: str, source: str, output: str, workers: str, dtype: str) -> dict[str, int | float]:
    """Convert in this process; seconds, and anonymous bytes above what the imports took, with their bound."""
    from dsv3_megatron.convert.hf_directory import HFDirectory
    from dsv3_megatron.convert.to_hf import MegatronWeights, megatron_to_hf
    from dsv3_megatron.convert.to_megatron import hf_to_megatron

    before = _anonymous_bytes()
    with _Peak() as peak:
        begin = time.perf_counter()
        if command == "hf-to-megatron":
            hf_to_megatron(Path(source), Path(output), dtype, int(workers))
        else:
            megatron_to_hf(Path(source), Path(output), dtype, workers=int(workers))
        seconds = time.perf_counter() - begin
    if command == "hf-to-megatron":
        given = HFDirectory(Path(source))
        largest = max(given.entry(name).numel * 2 for name in given.weights)
    else:
        saved = MegatronWeights(Path(source))
        largest = max(
            saved.dtype(name).itemsize * _numel(weight.shape) for name, weight in saved.weights.items()
        )
    bound = _FIXED_BYTES + _LARGEST_TENSORS * largest * int(workers)
    return {"seconds": seconds, "peak": peak.bytes - before, "largest_tensor": largest, "bound": bound}


class _Peak:
    """Samples this process's anonymous memory while inside."""

    def __enter__(self) -> "_Peak":
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, _anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def _convert(
    command: str, source: Path, output: Path, workers: int, dtype: str, rates: dict[str, list[float]]
) -> dict[str, int]:
    data = source / "release" if command == "megatron-to-hf" else source
    _read(data)
    words = ["--measured", command, str(source), str(output), str(workers), "--dtype", dtype]
    process = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron.convert.bench", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result = json.loads(process.stdout.splitlines()[-1])
    rates[command.replace("-", "_")].append(_size(data) / result.pop("seconds"))
    return result


def _copy(source: Path, target: Path) -> float:
    """`cp` and `sync` of the files: bytes per second."""
    shutil.rmtree(target, ignore_errors=True)
    _read(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *sorted(str(file) for file in target.rglob("*") if file.is_file())], check=True)
    return _size(source) / (time.perf_counter() - begin)


def _read(folder: Path) -> None:
    """Bring the files into the page cache, and wait until nothing of them is still to be written."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                while handle.read(1 << 24):
                    pass
                os.fsync(handle.fileno())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


if __name__ == "__main__":
    main()
