"""Throughput and memory of both conversions beside `cp` and `sync` of the same files, in one run.

python -m dsv3_megatron.studies.convert_speed [--folder runs/convert_bench] [--gigabytes 5] [--repeats 5]

makes a synthetic checkpoint in the form of the release (kept for the next run), then alternates between copying it,
converting it and converting it back: each time into a new folder on the same disk, the previous one just removed (a
virtual machine may have to ask its host for memory that was free for long), the source's pages in memory, and until
everything written is on disk. Rates are bytes of the Hugging Face files per second. Each conversion runs in a
process of its own, which reports its anonymous memory. The way back writes shards of half a GB, so that a checkpoint of
a few GB has several, as the release has.
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

from dsv3_megatron.convert.output import WORKERS
from dsv3_megatron.convert.synthetic import synthetic_release

__all__ = ["main"]

# Above what the imports take: 512 MiB, and three of the largest tensor.
_FIXED_BYTES, _LARGEST_TENSORS = 512 * 2**20, 3
_SHARD_SIZE = 500_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/convert_bench"))
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=WORKERS)
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
    """Rates (medians), their ratio to copying, and the memory of both conversions."""
    kind = "fp8" if options.fp8 else "bf16"
    hf = options.folder / f"hf_{kind}_{options.gigabytes:g}GB"
    if not hf.exists():
        print(f"bench: writing {hf}", file=sys.stderr)
        synthetic_release(hf, options.gigabytes * 1e9, options.fp8)
    megatron, back, copy = (options.folder / name for name in ("megatron", "back", "copy"))
    rates: dict[str, list[float]] = {"cp": [], "hf_to_megatron": [], "megatron_to_hf": []}
    memory: dict[str, dict[str, Any]] = {}
    dtype = "fp8" if options.fp8 else "keep"
    for _ in range(options.repeats):
        rates["cp"].append(_size(hf) / _copy(hf, copy))
        for name, source, output, dtype_ in (
            ("hf_to_megatron", hf, megatron, "keep"),
            ("megatron_to_hf", megatron, back, dtype),
        ):
            memory[name] = _convert(name.replace("_", "-"), source, output, options.workers, dtype_)
            rates[name].append(_size(hf) / memory[name].pop("seconds"))
    for folder in (megatron, back, copy):
        shutil.rmtree(folder, ignore_errors=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "input_bytes": _size(hf),
        "gb_per_s": {name: round(rate / 1e9, 3) for name, rate in median.items()},
        "of_cp": {name: round(rate / median["cp"], 3) for name, rate in median.items() if name != "cp"},
        "anonymous_memory": memory,
    }


def measured(command: str, source: str, output: str, workers: str, dtype: str) -> dict[str, int | float]:
    """Convert in this process; seconds, and anonymous bytes above what the imports took, with their bound."""
    from dsv3_megatron.convert.hf_directory import HFDirectory
    from dsv3_megatron.convert.to_hf import MegatronWeights, megatron_to_hf
    from dsv3_megatron.convert.to_megatron import hf_to_megatron

    _prepare(Path(source) / "release" if command == "megatron-to-hf" else Path(source), Path(output))
    before = _anonymous_bytes()
    with _Peak() as peak:
        begin = time.perf_counter()
        if command == "hf-to-megatron":
            hf_to_megatron(Path(source), Path(output), dtype, int(workers))
        else:
            megatron_to_hf(Path(source), Path(output), dtype, None, int(workers), _SHARD_SIZE)
        seconds = time.perf_counter() - begin
    if command == "hf-to-megatron":
        given = HFDirectory(Path(source))
        largest = max(given.entry(name).numel * 2 for name in given.weights)
    else:
        saved = MegatronWeights(Path(source))
        largest = max(
            saved.dtype(name).itemsize * _numel(weight.shape) for name, weight in saved.weights.items()
        )
    bound = _FIXED_BYTES + _LARGEST_TENSORS * largest
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


def _convert(command: str, source: Path, output: Path, workers: int, dtype: str) -> dict[str, Any]:
    """What `measured` says of a conversion in a process of its own."""
    words = ["--measured", command, str(source), str(output), str(workers), "--dtype", dtype]
    process = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron.studies.convert_speed", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def _copy(source: Path, target: Path) -> float:
    """Seconds of `cp` and `sync` of the files."""
    _prepare(source, target)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *sorted(str(file) for file in target.rglob("*") if file.is_file())], check=True)
    return time.perf_counter() - begin


def _prepare(source: Path, output: Path) -> None:
    """Bring the source into the page cache, wait until nothing of it is still to be written, make room."""
    shutil.rmtree(output, ignore_errors=True)
    for file in source.iterdir():
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
