"""Rollouts on ranks of their own: the bridge between the jobs; slow: a trainer's rollouts and gradient with both."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.posttrain.bridge import Bridge, BridgeClosed, split_address
from dsv3_megatron.studies.ports import free_port
from tests.posttrain.test_training import Setup, assert_same, assert_same_rollouts, grads, layout_words

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["setup"]


@pytest.fixture(scope="module")
def setup(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("apart"), tokenizer_dir)


def test_the_bridge_carries_messages_and_tensors_and_notices_a_lost_end() -> None:
    address = f"127.0.0.1:{free_port()}"
    found: dict[int, Any] = {}

    def rollout_rank(rank: int) -> None:
        bridge = Bridge(address, rank, 3)
        message = bridge.told()
        weights = bridge.broadcast(torch.zeros(2, 3, dtype=torch.bfloat16))
        bridge.answer({"rank": rank, "message": message, "sum": float(weights.float().sum())})
        if rank == 1:
            bridge.close()  # this one is lost
            return
        with pytest.raises(BridgeClosed):
            bridge.told()
        found[rank] = "noticed"

    others = [threading.Thread(target=rollout_rank, args=(rank,), daemon=True) for rank in (1, 2)]
    for thread in others:
        thread.start()
    bridge = Bridge(address, 0)
    assert bridge.size == 3
    said = {"prompts": [[1, 2], []], "text": "√", "log": -1.2345678901234567}
    bridge.tell(said)
    bridge.broadcast(torch.full((2, 3), 0.5, dtype=torch.bfloat16))
    assert bridge.answers() == [{"rank": rank, "message": said, "sum": 3.0} for rank in (1, 2)]
    others[0].join(30)
    with pytest.raises(BridgeClosed, match="the other job's end"):
        bridge.answers()
    bridge.close()
    others[1].join(30)
    assert found == {2: "noticed"}


@pytest.mark.parametrize("address", ["host", "host:", ":5", "host:99999", "host:0", "host:x", ""])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(RefusedArgument, match="give HOST:PORT"):
        split_address(address)
    assert split_address("10.0.0.1:29600") == ("10.0.0.1", 29600)


def test_nobody_at_the_address_is_one_line() -> None:
    with pytest.raises(RefusedArgument, match=r"--connect 127\.0\.0\.1:.*nobody is there") as error:
        Bridge(f"127.0.0.1:{free_port()}", 1, 2, wait=timedelta(seconds=1))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, world_size, count, words",
    [
        ("", 1, 1, []),
        (layout_words("dualpipe", 2, 2), 4, 2, ["--expert-model-parallel-size", "2"]),
        ("--rollout-temperature 0.7", 1, 2, []),
    ],
)
def test_rollouts_of_another_job_are_the_trainers_own(
    layout: str, world_size: int, count: int, words: list[str], setup: Setup, tmp_path: Path
) -> None:
    """Same samples, same gradient as without the other job, whatever the layouts of the two."""
    temperature = layout if "temperature" in layout else ""
    (whole,) = setup.run(setup.grpo(), temperature)
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port"]
    command += [
        str(free_port()),
        "-m",
        "dsv3_megatron",
        "rollouts",
        "--device",
        "cpu",
        "--connect",
        address,
        *words,
    ]
    command += ["--load", str(setup.folder / "pretrained")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        other = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            split = setup.run(setup.grpo(), f"{layout} --rollout-address {address}", world_size)
            other.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(other.pid, signal.SIGKILL)
            print((tmp_path / "log").read_text()[-3000:])
    assert other.returncode == 0 and "[rollouts] 1: 16 responses" in (tmp_path / "log").read_text()
    assert_same_rollouts(split, whole)
    assert_same(grads(split), grads([whole]))
