"""Read-only and full folders are refused before anything is built, with what the system says about them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.resilience import save_path


def test_a_good_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    save_path.check(folder)
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefusedArgument, match=r"--save .*/file/x: Not a directory"):
        save_path.check(tmp_path / "file" / "x")


def can_mount() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no user namespaces here, to mount a folder in")
@pytest.mark.parametrize(
    ("options", "answer"),
    [("ro", "Read-only file system"), ("size=512k", "No space left on device")],
    ids=["read-only", "full"],
)
def test_real_file_systems(options: str, answer: str, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from dsv3_megatron.errors import exits_cleanly\n"
        "from dsv3_megatron.resilience import save_path\n"
        "exits_cleanly(save_path.check)(Path(sys.argv[1]))"
    )
    mount = f'mount -t tmpfs -o {options} none "$1" && exec "$2" -c "$3" "$1/checkpoints"'
    words = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, program]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=os.getcwd())
    assert ended.returncode == 2
    assert f"error: --save {tmp_path}/checkpoints: {answer}" in ended.stderr
    assert "Traceback" not in ended.stderr
