"""The trainer's losses on 1, 2, 4 and 8 GPUs: reference backend against Transformer Engine, schedules, DeepEP."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

ITERATIONS = 20
WORDS = (
    "--spec dsv3 --num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 "
    "--q-lora-rank 128 --kv-lora-rank 128 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 "
    "--num-experts 8 --moe-layer-freq [0]*1+[1]*3 --moe-ffn-hidden-size 128 --moe-router-topk 4 "
    "--moe-router-num-groups 4 --moe-router-group-topk 2 --vocab-size 1024 --seq-length 256 --mock-data "
    f"--init-method-std 0.02 --micro-batch-size 1 --global-batch-size 16 --train-iters {ITERATIONS} "
    "--eval-iters 0 --lr 1e-3 --log-interval 1 --bf16 --use-distributed-optimizer"
).split()
LAYOUTS = {
    1: [],
    2: ["--expert-model-parallel-size", "2"],
    4: ["--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    8: ["--expert-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"],
}


PIPELINES = {2: 2, 4: 2, 8: 4}  # GPUs → pipeline ranks, experts over the rest


def losses(num_gpus: int, transformer_impl: str, folder: Path, *words: str) -> list[float]:
    """Main loss of every step; `words` displace what the layout says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    command += ["-m", "dsv3_megatron.train", *WORDS, *(words or LAYOUTS[num_gpus])]
    command += ["--transformer-impl", transformer_impl, "--tensorboard-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, ITERATIONS + 1))
    return [record["lm_loss"] for record in records]


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_losses(num_gpus: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    _needs(num_gpus)
    reference, te = (losses(num_gpus, name, tmp_path / name) for name in ("local", "transformer_engine"))
    record_property("first_losses", f"reference {reference[0]:.5f}, TE {te[0]:.5f}")
    record_property("last_losses", f"reference {reference[-1]:.5f}, TE {te[-1]:.5f}")
    worst = max(abs(a - b) / b for a, b in zip(te, reference, strict=True))
    record_property("largest_relative_difference", f"{worst:.2e}")
    assert te[0] == pytest.approx(reference[0], rel=1e-3)
    assert worst < 0.01
    assert reference[-1] < reference[0]
    if num_gpus > 1:
        single = losses(1, "local", tmp_path / "single")
        record_property("reference_on_one_gpu", f"{single[0]:.5f} ... {single[-1]:.5f}")
        assert reference == pytest.approx(single, rel=0.01)


def _needs(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"{torch.cuda.device_count()} GPUs are visible")


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
@pytest.mark.parametrize("num_gpus", PIPELINES)
def test_schedules(
    num_gpus: int, schedule: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Under every schedule as under Megatron's own, with Transformer Engine."""
    _needs(num_gpus)
    pp = PIPELINES[num_gpus]
    layout = ["--pipeline-model-parallel-size", str(pp), "--expert-model-parallel-size", str(num_gpus // pp)]
    if schedule == "dualpipev" and pp == 4:
        pytest.skip("eight stages need more than four layers")
    own = losses(num_gpus, "transformer_engine", tmp_path / "1f1b", *layout)
    ours = losses(
        num_gpus, "transformer_engine", tmp_path / schedule, *layout, "--pipeline-schedule", schedule
    )
    worst = max(abs(a - b) / b for a, b in zip(ours, own, strict=True))
    record_property("largest_relative_difference", f"{worst:.2e}")
    assert worst < 0.01


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_deepep(num_gpus: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """DeepEP's dispatcher against the all-to-all one."""
    _needs(num_gpus)
    if importlib.util.find_spec("deep_ep") is None:
        pytest.skip("DeepEP is not installed")
    layout = ["--expert-model-parallel-size", str(num_gpus)]
    flex = ["--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "deepep"]
    own = losses(num_gpus, "transformer_engine", tmp_path / "alltoall", *layout)
    ours = losses(num_gpus, "transformer_engine", tmp_path / "deepep", *layout, *flex)
    worst = max(abs(a - b) / b for a, b in zip(ours, own, strict=True))
    record_property("largest_relative_difference", f"{worst:.2e}")
    assert worst < 0.01
