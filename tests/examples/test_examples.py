"""The launch scripts: their shell, and the command they would run, built rank by rank as far as a CPU can."""

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.arguments import complete, megatron_parser, surroundings
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.dryrun import FakeWorld, weights_of
from dsv3_megatron.dryrun.world import megatron_args, model_config
from dsv3_megatron.preflight.machine import Machine
from dsv3_megatron.preflight.start import with_packages_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
# Script, words, GPUs, pipeline and expert parallel sizes, sequences per step.
RUNS = [
    ("pretrain_dsv3.sh", ["data/train", "tokenizer", "checkpoints"], 2048, 16, 64, 15360),
    ("slurm_2048gpu.sh", ["data/train", "tokenizer", "checkpoints"], 2048, 16, 64, 15360),
    ("slurm_256gpu.sh", ["data/train", "tokenizer", "checkpoints"], 256, 16, 16, 960),
    ("pretrain_dsv3_hydra.sh", ["corpus", "checkpoints"], 2048, 16, 64, 15360),
    ("slurm_2048gpu_hydra.sh", ["corpus", "checkpoints"], 2048, 16, 64, 15360),
    ("slurm_256gpu_hydra.sh", ["corpus", "checkpoints", "train_iters=1000"], 256, 16, 16, 960),
]


@functools.cache
def dry_run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DRY_RUN": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # What a batch system or an outer torchrun would set must not leak in.
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "SLURM_JOB_ID", "SLURM_SUBMIT_DIR"):
        env.pop(name, None)
    return subprocess.run(
        ["bash", f"examples/{script}", *words],
        capture_output=True,
        text=True,
        env=env,
        cwd=EXAMPLES.parent,
        timeout=120,
    )


def test_every_script_is_dry_run() -> None:
    pipeline = "r1_pipeline.sh"  # several commands: tests/posttrain/test_r1_pipeline.py
    assert [script.name for script in SCRIPTS] == sorted([pipeline, *(run[0] for run in RUNS)])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_missing_words_are_named(script: Path) -> None:
    done = dry_run(script.name)
    assert done.returncode != 0 and ("folder" in done.stderr or "prefix" in done.stderr)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


# Its command is compared with the plain script's by default, which is built.
SLOW = "slurm_2048gpu_hydra.sh"


@pytest.mark.parametrize(
    ("script", "words", "gpus", "pp", "ep", "batch"),
    [pytest.param(*run, id=run[0], marks=pytest.mark.slow if run[0] == SLOW else ()) for run in RUNS],
)
def test_dry_run(
    script: str, words: list[str], gpus: int, pp: int, ep: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = dry_run(script, *words)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == "torchrun"
    assert int(option(command, "--nnodes")) * int(option(command, "--nproc-per-node")) == gpus
    at = command.index("dsv3_megatron.train")
    assert command[at - 1] == "-m"
    arguments = command[at + 1 :]
    assert option(arguments, "--spec") == "dsv3"

    # On its own cluster nothing is refused.
    there = Surroundings(world_size=gpus, ranks_per_node=8, files_here=False)
    # Here there is no Transformer Engine that Megatron could look at.
    with monkeypatch.context() as patch, with_packages_of(Machine(te="2.20")):
        patch.setattr(surroundings, "detect", lambda: there)
        completed = complete(arguments, around=there)
        # Megatron accepts them as they are, Transformer Engine's backend and all.
        assert model_config(megatron_args(arguments, 0, gpus, 8)).transformer.bf16
    args = megatron_parser().parse_args(completed)
    assert (args.pipeline_model_parallel_size, args.expert_model_parallel_size) == (pp, ep)
    assert args.global_batch_size == batch and args.bf16 and args.num_layers == 61
    assert args.transformer_impl == "transformer_engine" and args.pipeline_schedule == "dualpipe"
    assert args.fp8_quantizer_factory == "dsv3_megatron.fp8.te_recipe.dsv3"

    # The first rank, with Megatron's own validation, groups and modules.
    with FakeWorld(arguments, 0, gpus, 8) as world:
        assert world.group_sizes()["dp"] == gpus // pp and world.group_sizes()["ep"] == ep
        weights = [weight for chunk in world.build_chunks() for weight in weights_of(chunk)]
        layers = {weight.layer for weight in weights if weight.layer is not None and not weight.mtp}
    # DualPipe: the first stage and the last lie on one rank.
    assert layers == {0, 1, 2, 3, 60}


def test_hydra_and_plain_scripts_train_alike() -> None:
    """Both describe the same model, layout, schedule of the learning rate and batch."""
    parsed = []
    for script, words in (run[:2] for run in RUNS if run[0].startswith("slurm_2048gpu")):
        command = shlex.split(dry_run(script, *words).stdout.splitlines()[-1])
        parser = megatron_parser()
        parsed.append(vars(parser.parse_args(_on_2048(command[command.index("dsv3_megatron.train") + 1 :]))))
    plain, hydra = parsed
    differ = {name for name in plain if plain[name] != hydra[name]}
    assert differ <= {
        "data_path", "split", "train_data_path", "valid_data_path", "tokenizer_model",
        "eval_interval", "eval_iters", "vocab_size",
    }  # fmt: skip


def _on_2048(arguments: list[str]) -> list[str]:
    return complete(arguments, around=Surroundings(world_size=2048, files_here=False))
