"""Train a small base model, then teach it to count from rewards alone; three seeds, a control, two other ways.

    base       documents of digits that go on at random, to the next one more often than to others
    rl         GRPO from the base model, reward 1 for counting up to 9 and stopping there
    shuffled   the same with rewards dealt out anew among the samples: the control
    sft        the same number of updates on problems with their right answers
    dpo        the same number of updates on pairs of a right and a wrong response of the base model

The last line on stdout is one JSON object. Its numbers are the worst of the seeds (the highest before and of the
control, the lowest after), and "seeds" has every arm of each. The same command goes on where it was interrupted.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.run import quoted, saved_iteration
from dsv3_megatron.posttrain.journal import JOURNAL, read_journal
from dsv3_megatron.studies.rl import data
from dsv3_megatron.studies.rl.picture import ARMS, draw

SEEDS = (1, 2, 3)
SEQ_LENGTH = 64
GROUP, PROMPTS = 8, 32  # samples of a rollout
ROWS = 64  # of an update, in which they are packed
STEPS = 40
BASE_STEPS = 150
BASE_DOCUMENTS = 20_000
EVERY = 10  # updates between measurements
MODEL = (
    "model=micro",
    "layout=cpu_single",
    "schedule=1f1b",
    "device=cpu",
    "hidden_size=64",
    "ffn_hidden_size=192",
    "num_attention_heads=4",
    "q_lora_rank=32",
    "kv_lora_rank=16",
    "num_layers=2",
    "moe_layer_freq='([0]*1+[1]*1)'",
    "num_experts=4",
    "moe_router_num_groups=2",
    "moe_router_group_topk=2",
    "moe_ffn_hidden_size=64",
    "moe_shared_expert_intermediate_size=64",
    "mtp_num_layers=0",
    "init_method_std=0.08",  # about one over the square root of the width
    "qk_pos_emb_head_dim=16",
    "rotary_base=100",  # problems are a few tokens long
    "vocab_size=null",
    f"seq_length={SEQ_LENGTH}",
    f"max_position_embeddings={SEQ_LENGTH}",
)


class DemoFailed(RuntimeError):
    """An arm ended with an error; the text says which, and where its output is."""


@dataclass(frozen=True)
class Arm:
    """One process: a name, where it lives, what it is started with."""

    name: str
    folder: Path
    iterations: int
    overrides: Sequence[str]
    sample: Sequence[str] = ()
    every: int = EVERY

    @property
    def held_out_file(self) -> Path:
        return self.folder / "held_out.json"

    def held_out(self) -> dict[int, dict[str, float]]:
        """Iteration → reward and length on held-out problems, so far."""
        found = json.loads(self.held_out_file.read_text()) if self.held_out_file.exists() else {}
        return {int(iteration): values for iteration, values in found.items()}

    @property
    def done(self) -> bool:
        sampled = not self.sample or Path(self.sample[1]).exists()
        saved = saved_iteration(self.folder / "checkpoints") >= self.iterations
        return saved and sampled and self.iterations in self.held_out()

    def command(self) -> list[str]:
        """Of the worker."""
        save = quoted(self.folder / "checkpoints")
        words = ["--held-out", str(self.held_out_file), "--every", str(self.every), *self.sample]
        common = [f"save={save}", f"load={save}", "save_interval=20", "log_interval=1"]
        last = [f"train_iters={self.iterations}", *common]
        return [sys.executable, "-m", "dsv3_megatron.studies.rl.worker", *words, *self.overrides, *last]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.rl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-rl"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 1 2 3")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of each arm (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=tuple(ARMS), help="default: all")
    parser.add_argument(
        "--processes", type=int, default=2, help="arms at the same time (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        result = run(args)
    except (ValueError, OSError, DemoFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"[demo] picture: {args.run_dir / 'reward.png'}")
    print(f"[demo] {time.monotonic() - started:.0f} s")
    print(json.dumps(result), flush=True)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Base model, arms, picture; returns the result that is printed."""
    if any(seed < 1 for seed in args.seeds) or args.steps < 1 or args.base_steps < 1 or args.processes < 1:
        raise ValueError("--seeds, --steps, --base-steps and --processes: must be 1 or more")
    args.run_dir.mkdir(parents=True, exist_ok=True)
    base = base_arm(args)
    data.write_corpus(base.folder / "corpus", BASE_DOCUMENTS, seed=0)
    run_arms([base], 1)
    arms = {(arm, seed): posttraining_arm(arm, seed, args, base) for seed in args.seeds for arm in args.arms}
    run_arms(list(arms.values()), args.processes)
    held_out = {key: arm.held_out() for key, arm in arms.items()}
    journals = {key: read_journal(arm.folder / "checkpoints" / JOURNAL) for key, arm in arms.items()}
    draw(held_out, journals, args.run_dir / "reward.png")
    result = summary(held_out, args.steps)
    (args.run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def summary(
    held_out: Mapping[tuple[str, int], Mapping[int, Mapping[str, float]]], steps: int
) -> dict[str, Any]:
    """The worst of the seeds, and every arm of each seed."""
    seeds: dict[str, dict[str, float]] = {}
    for (arm, seed), curve in held_out.items():
        entry = seeds.setdefault(str(seed), {})
        entry["before"] = curve[0]["reward"]
        entry[arm] = curve[steps]["reward"]

    def worst(name: str, pick: Any) -> float | None:
        values = [entry[name] for entry in seeds.values() if name in entry]
        return pick(values) if values else None

    return {
        "held_out_before": worst("before", max),
        "held_out_after": worst("rl", min),
        "shuffled_control_after": worst("shuffled", max),
        "seeds": seeds,
    }


def base_arm(args: argparse.Namespace) -> Arm:
    """Pre-training on the documents, and samples of the finished model for the pairs."""
    folder = args.run_dir / "base"
    folder.mkdir(parents=True, exist_ok=True)
    corpus = quoted(folder / "corpus")
    overrides = [
        *MODEL,
        "data=indexed",
        f"corpus.dir={corpus}",
        f"data_cache_path={quoted(folder / 'corpus' / 'cache')}",
        "micro_batch_size=16",
        "global_batch_size=16",
        "lr=1e-2",
        "min_lr=1e-3",
        "lr_warmup_fraction=0.05",
        "seed=1",
        "eval_iters=0",
    ]
    sampled = ["--sample", str(folder / "samples.jsonl"), "--sampled", str(max(args.seeds)), "128", "16"]
    return Arm("base", folder, args.base_steps, overrides, sampled if "dpo" in args.arms else (), every=100)


def posttraining_arm(arm: str, seed: int, args: argparse.Namespace, base: Arm) -> Arm:
    """One way of going on from the base model."""
    folder = args.run_dir / f"{arm}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = base.folder / "corpus"
    overrides = [
        *MODEL,
        f"recipe={'grpo' if arm in ('rl', 'shuffled') else arm}",
        f"pretrained_checkpoint={quoted(base.folder / 'checkpoints')}",
        "micro_batch_size=16",
        f"global_batch_size={ROWS}",
        f"seed={seed}",
        "lr=1e-3",  # a thousand times R1-Zero's, for a model of a hundred thousandth of its size
        "min_lr=1e-3",
        "lr_decay_style=constant",
        "recompute_granularity=null",
        "recompute_modules=null",
    ]
    if arm in ("rl", "shuffled"):
        data.write_prompts(folder / "prompts.jsonl", 4000, seed)
        overrides += [
            "data=prompts",
            f"tokenizer_model={quoted(tokenizer)}",
            f"prompt_data={quoted(folder / 'prompts.jsonl')}",
            "reward='dsv3_megatron.posttrain.counting:reward'",
            "text_begin=end",
            f"samples_per_prompt={GROUP}",
            f"prompts_per_rollout={PROMPTS}",
            "max_response_length=8",
            "rollout_batch=256",
            "policy_clip=0.2",
            f"shuffle_rewards={str(arm == 'shuffled').lower()}",
        ]
    elif arm == "sft":
        data.write_demonstrations(folder / "rows", tokenizer, GROUP * PROMPTS * args.steps, SEQ_LENGTH, seed)
        overrides += ["data=sft", f"sft_data={quoted(folder / 'rows')}"]
    elif not (folder / "checkpoints").exists():
        data.write_pairs(folder / "pairs", tokenizer, Path(base.sample[1]), SEQ_LENGTH, seed)
    if arm == "dpo":
        overrides += [
            "data=preference",
            f"preference_data={quoted(folder / 'pairs')}",
            "preference_epochs=1000",
        ]
    return Arm(f"{arm} {seed}", folder, args.steps, overrides)


def run_arms(arms: Sequence[Arm], at_once: int) -> None:
    """Run what is not done yet, so many at a time.

    Raises:
        DemoFailed: an arm failed; the others have been ended.
    """
    waiting = [arm for arm in arms if not arm.done]
    running: dict[str, tuple[Arm, subprocess.Popen[bytes], int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                arm = waiting.pop(0)
                running[arm.name] = (arm, _start(arm), 0)
            for name, (arm, process, told) in list(running.items()):
                status = process.poll()
                running[name] = (arm, process, _tell(arm, told))
                if status is None:
                    continue
                del running[name]
                if status or not arm.done:
                    raise DemoFailed(f"{name} ended with status {status}: its output is {arm.folder / 'log'}")
            time.sleep(0.5)
    finally:
        for _, process, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for _, process, _ in running.values():
            process.wait()


def _start(arm: Arm) -> subprocess.Popen[bytes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    own = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (arm.folder / "log").open("wb") as log:
        return subprocess.Popen(arm.command(), stdout=log, stderr=log, env={**os.environ, **world, **own})


def _tell(arm: Arm, told: int) -> int:
    """Print the arm's new lines that are for people; how many bytes of its log have been read."""
    with (arm.folder / "log").open("rb") as log:
        log.seek(told)
        text = log.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        if line.startswith("[demo]"):
            print(f"[demo] {arm.name}:{line.removeprefix('[demo]')}", flush=True)
    return told + len(whole)


if __name__ == "__main__":
    sys.exit(main())
