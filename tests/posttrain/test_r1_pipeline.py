"""R1's pipeline by its script: the commands form a chain; slow: all five stages run in small, the reward rises."""

import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.conf import compose
from dsv3_megatron.posttrain import counting
from dsv3_megatron.studies.ports import free_port
from dsv3_megatron.studies.rl.__main__ import MODEL

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "r1_pipeline.sh"
STAGES = ("cold_start", "rl", "sft", "rl2")


def pipeline(
    *words: str, variables: Mapping[str, str], timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env={**env, **variables},
        cwd=ROOT,
        timeout=timeout,
    )


def commands(**variables: str) -> list[list[str]]:
    words = ("base", "tok", "cold.jsonl", "p.jsonl", "out", "model=micro")
    done = pipeline(*words, variables={"DRY_RUN": "1", **variables})
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def value(words: list[str], key: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return found


def test_each_stage_begins_with_the_last_ones_checkpoint() -> None:
    found = commands()
    trained = [words for words in found if "dsv3_megatron.train_hydra" in words]
    saved = [value(words, "save") for words in trained]
    assert saved == [f"out/{stage}/checkpoints" for stage in STAGES]
    assert [value(words, "pretrained_checkpoint") for words in trained] == ["base", *saved[:-1]]
    assert all(value(words, "save_interval") == "50" for words in trained)  # without it a stage is refused
    assert [value(words, "recipe") for words in trained] == ["sft", "grpo", "sft", "grpo"]
    (sampled,) = [words for words in found if words[3] == "sample"]
    assert sampled[sampled.index("--load") + 1] == "out/rl/checkpoints"
    kept = sampled[sampled.index("--output") + 1]
    assert [words[words.index("--input") + 1] for words in found if "--input" in words] == [
        "cold.jsonl",
        kept,
    ]
    for words in trained:  # Hydra's groups take every override
        cfg = compose(words[words.index("dsv3_megatron.train_hydra") + 1 :])
        assert cfg.get("posttrain") == {"sft": None, "grpo": "grpo"}[value(words, "recipe")]
    assert cfg.rollout_temperature == 0.7 and cfg.reward == "answer=1,format=0.2,language=0.2"
    again = [words for words in commands(SECOND_SFT_FROM="base") if "save=out/sft/checkpoints" in words]
    assert value(again[0], "pretrained_checkpoint") == "base"


def test_a_missing_file_is_named_before_the_first_stage(tmp_path: Path) -> None:
    for name in ("base", "tok", "cold.jsonl"):
        (tmp_path / name).touch()
    words = [str(tmp_path / name) for name in ("base", "tok", "cold.jsonl", "p.jsonl", "out")]
    done = pipeline(*words, variables={})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.startswith(f"[r1] {words[3]}: not there") and not Path(words[4]).exists()


def write(file: Path, lines: list[Any]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def trainer(folder: Path, *overrides: str) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **alone, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dsv3_megatron.train_hydra", *overrides]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def journal(folder: Path) -> list[dict[str, float]]:
    return [
        json.loads(line) for line in (folder / "checkpoints" / "posttrain.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_all_five_stages_in_small(tmp_path: Path) -> None:
    """A cold start whose answers are right half of the time in the right format; each stage mends some of the rest."""
    from dsv3_megatron.data.vocabulary import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    save_tokenizer(train_tokenizer(["<think></think> <answer></answer>"] * 9, MIN_VOCAB_SIZE + 16), tokenizer)
    small = [
        *MODEL,
        "micro_batch_size=16",
        "recompute_granularity=null",
        "recompute_modules=null",
        "log_interval=1",
    ]
    trainer(
        tmp_path,
        *small,
        "data=mock",
        "tokenizer_type=HuggingFaceTokenizer",
        f"tokenizer_model={tokenizer}",
        "global_batch_size=16",
        "train_iters=1",
        "eval_iters=0",
        "save=base",
        "save_interval=1",
    )
    rng, cold = random.Random(0), []
    for prompt, answer in counting.problems(1600, 1, held_out=False):
        said = answer if rng.random() < 0.5 else "".join(rng.choices("0123456789", k=len(answer)))
        response = f"<think>{prompt[-1]}</think> <answer>{said}</answer>"
        cold.append(
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
        )
    asked = [
        {"prompt": [{"role": "user", "content": prompt}], "answer": answer}
        for prompt, answer in counting.problems(96, 2, held_out=False)
    ]
    out = tmp_path / "out"
    given = [str(tmp_path / "base"), str(tokenizer), write(tmp_path / "cold.jsonl", cold)]
    given += [write(tmp_path / "prompts.jsonl", asked), str(out), *small, "save_interval=4"]
    variables = {
        "LAUNCH": "python -m",
        "SEQ_LENGTH": "64",
        "MAX_RESPONSE": "24",
        "SAMPLES": "4",
        "SAMPLE": "--device cpu --max-length 64 --max-batch 128",
        "SFT": "global_batch_size=32 sft_epochs=4 lr=5e-3 min_lr=1e-3",
        "RL": "samples_per_prompt=8 prompts_per_rollout=16 global_batch_size=64 rollout_batch=128 train_iters=12 "
        "lr=1e-3 min_lr=1e-3 policy_clip=0.2",
        "RL2": "rollout_temperature=0.7 train_iters=4",
    }
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = pipeline(*given, variables={**variables, "MASTER_PORT": str(free_port())}, timeout=1800)
    assert done.returncode == 0, done.stderr
    first, second = journal(out / "rl"), journal(out / "rl2")
    kept = [json.loads(line) for line in (out / "rejection" / "kept.jsonl").read_text().splitlines()]
    sampled = json.loads((out / "rejection" / "log").read_text().splitlines()[-1])
    print("rl", [round(line["reward"], 3) for line in first], "finished", first[0]["finished"])
    print("rejection", sampled)
    print("rl2", [round(line["reward"], 3) for line in second])

    assert first[0]["reward"] > 0.3, "the cold start has taught the format"
    assert sum(line["reward"] for line in first[-3:]) / 3 > first[0]["reward"] + 0.15
    assert 0 < sampled["kept"] == len(kept) < sampled["samples"] == 4 * len(asked)
    assert all(line["parts"]["answer"] == 1 for line in kept) and all(
        line["messages"][0] == {"role": "user", "content": line["messages"][0]["content"]} for line in kept
    )
    assert second[0]["reward"] > first[0]["reward"] + 0.15
    for stage, before in zip(
        STAGES, (tmp_path / "base", *(out / s / "checkpoints" for s in STAGES)), strict=False
    ):
        assert f"loaded checkpoint from {before}" in " ".join((out / stage / "log").read_text().split())
    logs = [(out / stage / "log").stat().st_size for stage in STAGES]
    assert pipeline(*given, variables=variables).returncode == 0  # nothing is left to do
    assert [(out / stage / "log").stat().st_size for stage in STAGES] == logs
