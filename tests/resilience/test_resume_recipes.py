"""Every recipe: N steps, saved, resumed, N more, are 2N steps, bit for bit.

Compared are weights, moments, averages, random states and learning rates; the order of data shows in the weights.
"""

from pathlib import Path

import pytest
import torch

from dsv3_megatron.conf.compose import groups
from tests.harness import run_distributed
from tests.parallel.test_resume import tensors
from tests.sft.test_masking import SEQ_LENGTH, write_rows

COMMON = ["model=micro", "layout=cpu_single", "device=cpu", f"seq_length={SEQ_LENGTH}", "micro_batch_size=1"]
COMMON += [
    f"max_position_embeddings={SEQ_LENGTH}",
    "global_batch_size=8",
    "log_interval=1",
    "lr=1e-3",
    "min_lr=1e-4",
]
COMMON += ["use_distributed_optimizer=true"]
PIPELINE = ["schedule=dualpipe", "pipeline_model_parallel_size=2", "cluster.gpus_per_node=2"]
# What each recipe needs to be small; `{}` is a folder with `pretrained` and `rows`.
RECIPES = {
    "small": ["train_iters=4"],
    "v3_pretrain": ["train_tokens=1024", "batch_ramp=null", "last_lr=1e-5", "ema_decay=0.9", *PIPELINE],
    "longctx_32k": ["train_iters=4", "pretrained_checkpoint={}/pretrained", "min_lr=1e-3", *PIPELINE],
    "longctx_128k": ["train_iters=4", "pretrained_checkpoint={}/pretrained", "min_lr=1e-3"],
    "sft": ["data=sft", "sft_data={}/rows", "sft_epochs=4", "pretrained_checkpoint={}/pretrained", *PIPELINE],
}


def train(rank: int, world_size: int, overrides: list[str]) -> list[float]:
    """Train; the learning rate of each step."""
    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv
    from dsv3_megatron.training import hooks

    lrs: list[float] = []
    hooks.after_step(lambda call, result: lrs.append(float(call["optimizer"].param_groups[0]["lr"])))
    try:
        train.main(to_argv(compose(overrides, processes=world_size)))
    except SystemExit as left:  # how Megatron ends at --exit-interval
        assert not left.code
    return lrs


def run(overrides: list[str]) -> list[float]:
    world_size = 2 if PIPELINE[0] in overrides else 1
    return run_distributed(train, world_size=world_size, timeout=400, init=False, overrides=overrides)[0]


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to begin with, and conversations."""
    folder = tmp_path_factory.mktemp("recipes")
    write_rows(folder / "rows", tokenizer_dir)
    tokenizer = ["tokenizer_type=HuggingFaceTokenizer", f"tokenizer_model={folder}/rows"]
    run([*COMMON, *tokenizer, "train_iters=1", f"save={folder}/pretrained", "save_interval=1"])
    return folder


def test_no_recipe_is_left_out() -> None:
    elsewhere = ["dpo", "grpo"]  # tests/posttrain/test_training.py: data of their own
    assert sorted([*RECIPES, *elsewhere]) == groups()["recipe"]


@pytest.mark.slow  # by default tests/parallel/test_resume.py, tests/recipe/test_trainer.py, tests/ema/test_trainer.py
@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_recipe(recipe: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    needs_folder = any("{}" in word for word in RECIPES[recipe])
    folder = request.getfixturevalue("folder") if needs_folder else None
    words = [*COMMON, f"recipe={recipe}", *(word.format(folder) for word in RECIPES[recipe])]
    if recipe.startswith("longctx"):
        words += ["tokenizer_type=HuggingFaceTokenizer", f"tokenizer_model={folder}/rows"]
    words += ["save_interval=2"]
    broken = [*words, f"save={tmp_path}/broken", f"load={tmp_path}/broken"]
    straight = run([*words, f"save={tmp_path}/straight", f"load={tmp_path}/straight"])
    first, second = run([*broken, "exit_interval=2"]), run(broken)
    assert len(straight) == 4 and straight == first + second
    a, b = (tensors(tmp_path / name / "iter_0000004") for name in ("straight", "broken"))
    half = tensors(tmp_path / "broken" / "iter_0000002")
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    trained = [name for name in a if not torch.equal(a[name], half[name])]
    for part in ("word_embeddings", "exp_avg_sq", "mtp", *(["ema"] if recipe == "v3_pretrain" else [])):
        assert any(part in name for name in trained), (part, list(a)[:5])
