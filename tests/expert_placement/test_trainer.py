"""The trainer with experts that move: losses, weights, moments and biases are to the bit those of experts that stay.

Checkpoints are compared tensor by tensor; what is in them is by expert, wherever the expert was.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.balance.placement import rank_load
from tests.arguments.lines import whole_mock_data
from tests.balance.test_placement import best_of_all
from tests.harness import run_distributed
from tests.parallel.test_resume import tensors
from tests.resilience.test_bad_steps import Fault

_MODEL = (
    "--num-layers 3 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --q-lora-rank 16 --kv-lora-rank 16 "
    "--qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --num-experts 16 --moe-layer-freq [0]*1+[1]*2 "
    "--moe-ffn-hidden-size 24 --moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2 --vocab-size 128 "
    "--seq-length 32 --init-method-std 0.02 --mock-data --micro-batch-size 1 --global-batch-size 8 --eval-iters 0 "
    "--lr 1e-2 --num-workers 0 --lr-decay-iters 6 --lr-warmup-iters 1 --log-interval 1"
)
STEPS = 6
WORDS = ["--spec", "dsv3", "--device", "cpu", *_MODEL.split()]
ZERO1 = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
BALANCED = ["--expert-placement", "balanced", "--expert-placement-interval", "2"]


def train(
    rank: int, world_size: int, words: list[str], fault: Fault | None, skew: float = 0.3
) -> dict[str, Any]:
    """Train with biases that prefer some experts; losses, and where experts were in each step."""
    from dsv3_megatron import train as trainer
    from dsv3_megatron.expert_placement.trainer import current
    from dsv3_megatron.training import hooks

    whole_mock_data()  # the loads below are of these tokens
    seen: dict[str, Any] = {"losses": [], "slots": []}

    def prefer(call: dict[str, Any]) -> None:
        for chunk in call["model"]:
            for name, module in chunk.named_modules():
                if name.endswith("router") and not getattr(module, "skewed", False):
                    module.skewed = True
                    if call["iteration"] == 0:
                        bias = torch.linspace(skew, 0, len(module.expert_bias)) ** 2
                        module.expert_bias.add_(bias.to(module.expert_bias))

    def follow(call: dict[str, Any], result: Any) -> None:
        seen["losses"].append({name: torch.as_tensor(x).tolist() for name, x in result[0].items()})
        placement = current()
        if placement is not None:
            seen["slots"].append([layer.slots.tolist() for layer in placement.layers])

    hooks.before_step(prefer)
    if fault is not None:
        hooks.before_step(fault.inject)
    hooks.after_step(follow)
    try:
        trainer.main([*WORDS, *words])
    except SystemExit as left:  # how Megatron ends at --exit-interval
        assert not left.code
    return seen


def run(world_size: int, folder: Path, *words: str, fault: Fault | None = None) -> list[dict[str, Any]]:
    words = (*words, "--save", str(folder), "--train-iters", str(STEPS))
    if "--save-interval" not in words:
        words = (*words, "--save-interval", str(STEPS))
    return run_distributed(train, world_size, timeout=500, init=False, words=list(words), fault=fault)


def assert_same_checkpoint(got: Path, wanted: Path, step: int = STEPS) -> None:
    a, b = (tensors(folder / f"iter_{step:07d}") for folder in (got, wanted))
    assert a.keys() == b.keys() and all(
        any(kind in name and "experts" in name for name in a) for kind in ("exp_avg_sq", "mlp.")
    )
    different = [name for name in b if not torch.equal(a[name], b[name])]
    assert not different, different[:10]


def moved(ranks: list[dict[str, Any]]) -> bool:
    return any(slots != list(range(16)) for rank in ranks for step in rank["slots"] for slots in step)


OFTEN = "fp32, a rank for four experts"  # the default tests' own
LAYOUTS = {
    OFTEN: (4, ["--expert-model-parallel-size", "4", *ZERO1]),
    "fp32, two copies": (4, ["--expert-model-parallel-size", "2", *ZERO1]),
    "bf16, dualpipe": (
        4,
        [
            *(
                "--bf16",
                "--expert-model-parallel-size",
                "2",
                *ZERO1,
                "--overlap-grad-reduce",
                "--overlap-param-gather",
            ),
            *("--pipeline-schedule", "dualpipe", "--pipeline-model-parallel-size", "2"),
        ],
    ),
    "fp32, two hops": (
        4,
        [
            "--expert-model-parallel-size",
            "4",
            "--moe-token-dispatcher-type",
            "two_hop",
            "--moe-node-size",
            "2",
            *ZERO1,
        ],
    ),
    "fp32, two hops, context parallel, recomputed": (
        4,
        [
            *("--expert-model-parallel-size", "4", "--context-parallel-size", "2", *ZERO1),
            *("--moe-token-dispatcher-type", "two_hop", "--moe-node-size", "2"),
            *("--recompute-granularity", "selective", "--recompute-modules", "moe"),
        ],
    ),
    "fp32, two optimizer instances": (
        4,
        ["--expert-model-parallel-size", "2", "--num-distributed-optimizer-instances", "2", *ZERO1],
    ),
    "fp32, no distributed optimizer": (2, ["--expert-model-parallel-size", "2"]),
    "bf16, fp8": (2, ["--bf16", "--fp8-recipe", "dsv3", "--expert-model-parallel-size", "2", *ZERO1]),
}


def run_both(name: str, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the ranks saw with experts that stay and with experts that move; checkpoints and log are in `folder`."""
    world_size, words = LAYOUTS[name]
    words = [*words, "--ema-decay", "0.9"]
    fixed = run(world_size, folder / "fixed", *words)
    log = ["--tensorboard-dir", str(folder / "log")]
    return fixed, run(world_size, folder / "balanced", *words, *BALANCED, *log)


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("often")
    return folder, run_both(OFTEN, folder)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == OFTEN else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_nothing_in_the_mathematics_changes(name, tmp_path, request):
    if name == OFTEN:
        folder, (fixed, balanced) = request.getfixturevalue("often")
    else:
        folder, (fixed, balanced) = tmp_path, run_both(name, tmp_path)
    assert moved(balanced) and not moved(fixed)
    assert [rank["losses"] for rank in balanced] == [rank["losses"] for rank in fixed]
    assert any(losses for rank in fixed for losses in rank["losses"])
    assert_same_checkpoint(folder / "balanced", folder / "fixed")


def test_the_fullest_rank_gets_emptier(often):
    folder, (_, ranks) = often
    records = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    fullest = [record["max_over_mean_rank_load"] for record in records]
    # The first step is not logged. From step 3 on experts are placed by the load of the two steps before; that of the
    # step itself is another one, of 64 tokens per expert.
    assert len(fullest) == STEPS - 1 and fullest[0] > 2.5 and max(fullest[1:]) < 1.4
    # What was placed after step 4 is within 5% of the best there is for the load of steps 3 and 4.
    of_step = {record["iteration"]: record["layers"] for record in records}
    numbers, placed = sorted(of_step[3]), ranks[0]["slots"][4]
    assert len(numbers) == len(placed) == 3
    for number, slots in zip(numbers, placed, strict=True):
        counts = [of_step[step][number]["tokens_per_expert"] for step in (3, 4)]
        load = torch.tensor(counts, dtype=torch.float64).sum(0)
        found = rank_load(load[None], torch.tensor(slots)[None], 4).max().item()
        assert found <= 1.05 * best_of_all(load.tolist(), 4, list(range(16)))


@pytest.mark.slow
def test_resumed_and_in_other_layouts(tmp_path):
    """A save in the middle of an interval; then on, with experts that move and with experts that stay."""
    words = ["--expert-model-parallel-size", "2", *ZERO1]
    run(2, tmp_path / "straight", *words)
    run(2, tmp_path / "moved", *words, *BALANCED, "--save-interval", "3", "--exit-interval", "3")
    load = ["--load", str(tmp_path / "moved")]
    again = run(2, tmp_path / "again", *words, *BALANCED, *load)
    assert moved(again)
    assert_same_checkpoint(tmp_path / "again", tmp_path / "straight")
    run(2, tmp_path / "fixed", *words, *load)
    assert_same_checkpoint(tmp_path / "fixed", tmp_path / "straight")


@pytest.mark.slow
def test_rewind_takes_the_average_home_and_back(tmp_path):
    """A bad step after a move: weights come from the checkpoint, the average of the weights stays each expert's own."""
    words = ["--expert-model-parallel-size", "2", *ZERO1, "--ema-decay", "0.9", "--on-bad-step", "rewind"]
    words += ["--save-interval", "3"]
    bad = Fault(rank=1, chunk=0, number=1, step=5)  # NaN; experts moved after steps 2 and 4
    fixed = run(2, tmp_path / "fixed", *words, fault=bad)
    balanced = run(2, tmp_path / "balanced", *words, *BALANCED, fault=bad)
    assert moved(balanced) and not moved(fixed)
    assert_same_checkpoint(tmp_path / "balanced", tmp_path / "fixed")
