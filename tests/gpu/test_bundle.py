"""The bundle for a machine without a network: its size, what is installed of it, and a rehearsal in a clean place."""

import importlib.metadata
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.gpu import bundle, te_part
from tests.gpu.stages import STAGES

BUNDLED = Path(bundle.__file__).parent / "bundled"


@pytest.fixture
def install() -> ModuleType:
    """install.py, which is no module of a package: it runs before anything is installed."""
    spec = importlib.util.spec_from_file_location("install", BUNDLED / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "report").mkdir()
    with open(tmp_path / "wheels" / "big.whl", "wb") as file:
        file.truncate(bundle.PART_LIMIT)
    with open(tmp_path / "report" / "report.json", "wb") as file:
        file.truncate(100)  # a report is no part of it
    assert bundle.check_size(tmp_path) == bundle.PART_LIMIT
    (tmp_path / "run.sh").write_text("#")
    with pytest.raises(SystemExit, match=r"has 60000001 bytes, more than 60000000: .*big\.whl"):
        bundle.check_size(tmp_path)


def test_only_what_is_missing_is_installed_and_our_own_always(install: ModuleType) -> None:
    def wanted(name: str) -> bool:
        return install.wanted(Path(f"{name}-1.0-py3-none-any.whl"))

    assert wanted("dsv3_megatron") and wanted("megatron_core") and wanted("nothing_like_it")
    assert not wanted("numpy") and not wanted("hydra_core") and not wanted("PyYAML")


def test_every_wheels_module_is_known_to_install(install: ModuleType) -> None:
    """install.py asks for the module of a wheel; the names are those of the table here."""
    for distribution, module in bundle.WHEELS.items():
        name = re.sub(r"[-_.]+", "_", distribution).lower()
        assert name in install.ALWAYS or install.MODULES.get(name, name) == module


def test_run_sh_without_a_stage_says_how(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(BUNDLED / "run.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "bash gpu_bundle/run.sh STAGE" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("9", "error: stage 9: use 1, 2, 3, 4, gpus or te"),
        ("1 five --cpu-rehearsal", "error: stage five: use 1,"),
        ("te 1", "error: stage te: it is built alone; use bash gpu_bundle/run.sh te, then"),
        ("1 te", "error: stage te: it is built alone"),
        ("1", "error: PYTHON=no-such-python: no such program"),
    ],
)
def test_run_sh_refuses_in_one_line_before_it_installs(words: str, says: str) -> None:
    done = subprocess.run(
        ["bash", str(BUNDLED / "run.sh"), *words.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": "no-such-python"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(says)


# --- Transformer Engine's part


def fat_binary(*codes: tuple[int, bytes]) -> bytes:
    """A container as nvcc makes it: entries with a header of 64 bytes, the architecture 28 bytes in."""
    inside = b""
    for architecture, code in codes:
        head = struct.pack("<HHIQ", 2, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack(
            "<I", architecture
        )
        inside += head.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(inside)) + inside


def test_only_code_of_hopper_is_kept() -> None:
    first = fat_binary((80, b"A" * 40), (90, b"B" * 56), (100, b"C" * 8))
    second = fat_binary((90, b"D" * 16), (75, b"E" * 32))
    chance = struct.pack("<I", 0xBA55ED50) + b"no header"
    library = b"\x7fELF" + first + chance + second + b"end"
    assert [entry.architecture for entry in te_part.entries(library)] == [80, 90, 100, 90, 75]
    kept = te_part.keep(library)
    assert len(kept) == len(library)
    for letter, number in ((b"A", 0), (b"B", 56), (b"C", 0), (b"D", 16), (b"E", 0)):
        assert kept.count(letter * 8) * 8 == number, letter
    assert kept == library.replace(b"A" * 40, bytes(40)).replace(b"C" * 8, bytes(8)).replace(
        b"E" * 32, bytes(32)
    )


def test_a_shrunken_wheel_is_a_wheel(tmp_path: Path) -> None:
    library = fat_binary((80, os.urandom(5000)), (90, os.urandom(500)))
    with zipfile.ZipFile(tmp_path / "te-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("te/lib.so", library)
        wheel.writestr("te-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: te\nVersion: 1\n")
        wheel.writestr(
            "te-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            "te-1.dist-info/RECORD", "te/lib.so,,\nte-1.dist-info/METADATA,,\nte-1.dist-info/WHEEL,,\n"
        )
    (tmp_path / "out").mkdir()
    small = tmp_path / "out" / "te-1-py3-none-any.whl"
    te_part.shrink(tmp_path / "te-1-py3-none-any.whl", small)
    assert small.stat().st_size < 2500
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(small)], check=True)
    assert (tmp_path / "site" / "te" / "lib.so").read_bytes() == te_part.keep(library)


# --- the whole, in a clean place


def bare_python(folder: Path) -> Path:
    """Python of a machine that has torch, Triton and pytest, and what these need: a link to each, nothing more."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(
        subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )
    new, seen = ["torch", "triton", "pytest"], set()
    while new:
        name = new.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        new += [
            re.split(r"[ \[;<>=!~(]", line)[0]
            for line in distribution.requires or []
            if "extra ==" not in line
        ]
        new += ["nvidia-cublas"] if name == "torch" else []
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return python


@pytest.mark.slow
def test_all_stages_are_rehearsed_from_the_bundle_alone(tmp_path: Path) -> None:
    """Built, put into an empty folder, installed without an index beside a bare Python, and every stage run."""
    folder = tmp_path / "elsewhere" / "gpu_bundle"
    bundle.build(folder)
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    env |= {"PYTHON": str(bare_python(tmp_path / "bare")), "PIP_NO_INDEX": "1"}
    for stage in "1234":
        command = ["bash", "gpu_bundle/run.sh", stage, "--cpu-rehearsal"]
        done = subprocess.run(
            command, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["device"] == "CPU"
    steps = {step.name for stage in "1234" for step in STAGES[stage].steps}
    assert {name: step["result"] for name, step in report["steps"].items()} == dict.fromkeys(steps, "passed")
    assert (folder / "site" / "megatron").is_dir()
