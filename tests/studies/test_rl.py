"""`make demo-rl`: what it says of its seeds, what it refuses; slow: killed at an odd moment it goes on bit-equal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.studies.rl.__main__ import main, summary

ROOT = Path(__file__).resolve().parents[2]


def test_the_result_is_the_worst_of_the_seeds() -> None:
    curves = {
        ("rl", 1): (0.15, 0.9),
        ("shuffled", 1): (0.15, 0.1),
        ("rl", 2): (0.17, 0.8),
        ("shuffled", 2): (0.17, 0.2),
    }
    held_out = {
        key: {0: {"reward": before}, 3: {"reward": 0.5}, 6: {"reward": after}}
        for key, (before, after) in curves.items()
    }
    found = summary(held_out, 6)
    assert list(found) == ["held_out_before", "held_out_after", "shuffled_control_after", "seeds"]
    assert [*found.values()][:3] == [0.17, 0.8, 0.2]
    assert found["seeds"]["2"] == {"before": 0.17, "rl": 0.8, "shuffled": 0.2}
    del held_out["shuffled", 1], held_out["shuffled", 2]
    assert summary(held_out, 6)["shuffled_control_after"] is None


@pytest.mark.parametrize(
    "words, text",
    [
        (["--steps", "0"], "--seeds, --steps, --base-steps and --processes: must be 1 or more"),
        (["--seeds", "-1"], "must be 1 or more"),
        (["--seeds", "2", "2"], "--seeds 2 2: each once"),
        (["--arms", "rl", "rl"], "--arms rl rl: each once"),
        (["--steps", "5"], "was begun with other settings (steps 24 there, 5 asked)"),
    ],
)
def test_settings_are_refused_before_anything_runs(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    there = {"seeds": [1, 2, 3], "steps": 24, "base_steps": 150, "arms": ["rl", "shuffled", "sft", "dpo"]}
    (tmp_path / "settings.json").write_text(json.dumps(there))
    assert main(["--run-dir", str(tmp_path), *words]) == 1
    assert text in capsys.readouterr().err and not (tmp_path / "base").exists()


def start(folder: Path) -> subprocess.Popen[str]:
    words = [
        "--run-dir",
        str(folder),
        "--seeds",
        "1",
        "--steps",
        "9",
        "--base-steps",
        "20",
        "--arms",
        "rl",
        "dpo",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dsv3_megatron.studies.rl", *words]
    return subprocess.Popen(command, env=env, cwd=folder.parent, stdout=subprocess.PIPE, text=True)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint: weights, moments, the state of random numbers."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    step = int((folder / "latest_checkpointed_iteration.txt").read_text())
    reader = dcp.FileSystemReader(folder / f"iter_{step:07d}")
    found: dict[str, Any] = _load_state_dict_from_keys(storage_reader=reader)
    return {name: value for name, value in _flat(found) if isinstance(value, torch.Tensor)}


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}")]


@pytest.mark.slow
def test_killed_at_an_odd_moment_it_goes_on_bit_equal(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = start(whole)
    expected = json.loads(straight.communicate(timeout=1200)[0].splitlines()[-1])
    assert straight.returncode == 0

    killed = start(broken)
    journal = broken / "rl_1" / "checkpoints" / "posttrain.jsonl"
    deadline = time.monotonic() + 600
    while not (journal.exists() and len(journal.read_text().splitlines()) >= 8):  # a checkpoint of 6 is there
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(3)  # its arms end with it
    lines = len(journal.read_text().splitlines())
    time.sleep(3)
    assert len(journal.read_text().splitlines()) == lines < 9
    shutil.copytree(broken / "rl_1", tmp_path / "as_killed")
    again = start(broken)
    result = json.loads(again.communicate(timeout=1200)[0].splitlines()[-1])
    assert again.returncode == 0 and result == expected
    for arm in ("rl_1", "dpo_1"):
        one, other = (weights_of(folder / arm / "checkpoints") for folder in (whole, broken))
        assert one.keys() == other.keys() and len(one) > 50
        for name, value in one.items():
            assert torch.equal(value, other[name]), (arm, name)
        for file in ("held_out.json", "checkpoints/posttrain.jsonl"):
            assert (whole / arm / file).read_text() == (broken / arm / file).read_text()
    begun = json.loads((tmp_path / "as_killed" / "held_out.json").read_text())
    assert "9" not in begun and (tmp_path / "as_killed" / "checkpoints" / "iter_0000006").is_dir()
