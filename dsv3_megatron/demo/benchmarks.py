"""The demo's last act: `dsv3 evaluate` of its model, in a process of its own, with tasks of this package."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.corpus import read_tokens
from dsv3_megatron.demo.launch import RunFailed

TASKS = ("dsv3_text", "dsv3_choice_en", "dsv3_needle")
DOCUMENTS = 10  # of each task, at most
HELD_OUT_TOKENS = 8_000


def benchmark(run_dir: Path, iteration: int) -> dict[str, dict[str, float]] | None:
    """Figures by task and metric of the newest checkpoint; without lm-evaluation-harness None, and a line says so.

    dsv3_text measures the first held-out documents. Writes `evaluation/` in `run_dir`.

    Raises:
        RunFailed: the evaluation failed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        print("[demo] no evaluation: it needs pip install 'dsv3_megatron[eval]'", flush=True)
        return None
    folder = run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    held_out = folder / "held_out.txt"
    held_out.write_text(_held_out(run_dir / "corpus"), encoding="utf-8")
    words = ["--load", run_dir / "checkpoints", "--device", "cpu", "--text", held_out, "--limit", DOCUMENTS]
    command = [sys.executable, "-m", "dsv3_megatron", "evaluate", *words, "--json"]
    command += ["--output", folder / f"iteration_{iteration}", "--tasks", *TASKS]
    print(f"[demo] evaluating: {', '.join(TASKS)}", flush=True)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=environment)
    if ran.returncode:
        raise RunFailed("the evaluation failed (dsv3 evaluate, above)")
    return json.loads(ran.stdout.splitlines()[-1])["results"]


def lines(figures: dict[str, dict[str, float]]) -> list[str]:
    """A line for each task, without standard errors."""

    def shown(values: dict[str, Any]) -> str:
        return ", ".join(
            f"{name.removesuffix(',none')} {value:.4g}"
            for name, value in values.items()
            if value is not None and "_stderr" not in name
        )

    return [f"[demo] {task}: {shown(values)}" for task, values in figures.items()]


def _held_out(corpus: Path) -> str:
    from tokenizers import Tokenizer

    tokens = read_tokens(corpus, "valid")[:HELD_OUT_TOKENS]
    return Tokenizer.from_file(str(corpus / "tokenizer.json")).decode(tokens.tolist())
