"""`dsv3 adopt` from the outside."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"


def dsv3(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "dsv3_megatron", "adopt", *words],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )


def test_a_script_and_its_status() -> None:
    done = dsv3(str(SCRIPTS / "mindspeed_like.sh"))
    assert done.returncode == 0, done.stderr
    assert (
        "  --qk-nope-head-dim 128" in done.stdout and "the script's model, and nothing in it" in done.stdout
    )
    assert "torchrun --nnodes 4 --nproc-per-node 8" in done.stdout and "Traceback" not in done.stderr
    done = dsv3(
        str(SCRIPTS / "zoo_like.yaml"), "--set", "SEQ_LEN=64", "MBS=1", "GBS=4", "TP=3", "--ranks", "8"
    )
    assert done.returncode == 1 and "problem: --tensor-model-parallel-size" in done.stdout


def test_wrong_words() -> None:
    for words in (["nowhere.sh"], [str(SCRIPTS / "zoo_like.yaml"), "--set", "SEQ_LEN"]):
        done = dsv3(*words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
