"""`make gpu-bundle`: a folder with which a machine without a network runs `bash gpu_bundle/run.sh STAGE`.

    gpu_bundle/     run.sh, wheels (this package, Megatron and what they need), tests
    gpu_bundle_te/  optional: Transformer Engine (see `te_part`)

The machine has torch, Triton, CUDA and pytest of its own; of the wheels it gets what it lacks. Each part is at most
60 MB, since such machines take little more at a time.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.errors import Parser
from tests.gpu import te_part

ROOT = Path(__file__).parents[2]
PART_LIMIT = 60_000_000
# What trainer and tests import, beside torch, Triton and pytest with what these need themselves. (distribution, module)
WHEELS = {
    "megatron-core": "megatron.core",
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "antlr4-python3-runtime": "antlr4",
    "PyYAML": "yaml",
    "numpy": "numpy",
    "packaging": "packaging",
    "tensorboard": "tensorboard",
    "tensorboard-data-server": "tensorboard_data_server",
    "absl-py": "absl",
    "grpcio": "grpc",
    "Markdown": "markdown",
    "protobuf": "google.protobuf",
    "Werkzeug": "werkzeug",
    "tokenizers": "tokenizers",
    "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
    "psutil": "psutil",  # whoever writes a checkpoint
}
TARGET = (
    "--python-version",
    "3.12",
    "--implementation",
    "cp",
    "--abi",
    "cp312",
    "--abi",
    "abi3",
    "--abi",
    "none",
)
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 5)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="tests.gpu.bundle", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_bundle")
    parser.add_argument("--te", action="store_true", help="Transformer Engine's part too (downloads 190 MB)")
    options = parser.parse_args(argv)
    build(options.out)
    if options.te:
        te_part.build(options.out.with_name(options.out.name + "_te"))
    return 0


def build(out: Path) -> None:
    """Write the folder anew; a report in it stays.

    Raises:
        SystemExit: it would be larger than a part may be, or pip could not get a wheel.
    """
    for name in ("wheels", "tests", "site"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "wheels").mkdir(parents=True)
    print("wheels", flush=True)
    _own_wheel(out / "wheels")
    for distribution in WHEELS:
        _fetch(distribution, out / "wheels")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", out / "tests", ignore=ignore)
    for name in ("run.sh", "install.py"):
        shutil.copy(Path(__file__).parent / "bundled" / name, out / name)
    size = check_size(out)
    print(f"{out}: {size / 1e6:.1f} MB, {len(list((out / 'wheels').iterdir()))} wheels. Then, there:")
    print(f"  bash {out.name}/run.sh 1")


def check_size(out: Path) -> int:
    """Bytes of a part, its report left out.

    Raises:
        SystemExit: more than `PART_LIMIT`; the largest files are named.
    """
    files = {
        path: path.stat().st_size for path in out.rglob("*") if path.is_file() and "report" not in path.parts
    }
    size = sum(files.values())
    if size > PART_LIMIT:
        largest = sorted(files, key=lambda path: -files[path])[:3]
        raise SystemExit(
            f"error: {out} has {size} bytes, more than {PART_LIMIT}: {', '.join(map(str, largest))}"
        )
    return size


def _own_wheel(wheels: Path) -> None:
    """This package, built from a copy so that no build folder is left here."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "source"
        copy.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        shutil.copytree(
            ROOT / "dsv3_megatron", copy / "dsv3_megatron", ignore=shutil.ignore_patterns("__pycache__")
        )
        _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(copy))


def _fetch(distribution: str, wheels: Path) -> None:
    """The wheel of the version installed here; built from its source where there is none (antlr4)."""
    import importlib.metadata

    version = importlib.metadata.version(distribution)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    spec = f"{distribution}=={version}"
    try:
        _pip("download", "--no-deps", "--only-binary=:all:", *TARGET, *platforms, "-d", str(wheels), spec)
    except subprocess.CalledProcessError:
        _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), spec)


def _pip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
