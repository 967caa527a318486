"""Environments that are kept between clones: what they hold outlives the clone that made them."""

import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "oldest_torch.sh"


def _packages(python: str | Path) -> Path:
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())


def _made(python: Path) -> str:
    """The interpreter of the environment with the oldest torch, as `make test-oldest` reads it."""
    command = ["bash", str(SCRIPT), str(python), "2.11", "3.6"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _imports(python: str, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def _kept_and_clone(tmp_path: Path) -> tuple[Path, Path]:
    """A cached environment (pip is a stand-in that installs nothing), and a clone whose .venv is a link to it."""
    kept = tmp_path / "cache" / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", kept], check=True)
    packages = _packages(kept / "bin" / "python")
    (packages / "pip.py").write_text("")
    (packages / "all_else.py").write_text("")
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / ".venv").symlink_to(kept)
    return kept, clone


def test_the_oldest_torchs_environment_outlives_the_clone_that_made_it(tmp_path) -> None:
    kept, clone = _kept_and_clone(tmp_path)
    oldest = _made(clone / ".venv" / "bin" / "python")
    assert oldest == f"{kept}-torch-2.11/bin/python"
    assert _imports(oldest, "all_else")
    assert not _imports(oldest, "something_else")
    shutil.rmtree(clone)
    assert _imports(oldest, "all_else")


def test_one_that_was_made_by_a_clones_path_is_mended(tmp_path) -> None:
    _, clone = _kept_and_clone(tmp_path)
    oldest = _made(clone / ".venv" / "bin" / "python")
    (_packages(oldest) / "zz_all_else.pth").write_text(f"{tmp_path / 'gone' / '.venv'}\n")
    assert not _imports(oldest, "all_else")  # As the kept ones were.
    assert _made(clone / ".venv" / "bin" / "python") == oldest
    assert _imports(oldest, "all_else")
