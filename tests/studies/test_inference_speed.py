"""The benchmark of the engine beside transformers writes the same tokens on both sides."""

import json
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "dsv3_megatron.studies.inference_speed"]


@pytest.mark.slow
def test_both_sides_write_the_same_tokens():
    words = ["--batch", "3", "--new-tokens", "6", "--repeats", "1"]
    ran = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=True)
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["tokens_equal"] is True and (result["batch"], result["new_tokens"]) == (3, 6)
    ratio = result["tokens_per_s"] / result["transformers_tokens_per_s"]
    assert result["ratio"] == pytest.approx(ratio) and ratio > 0
