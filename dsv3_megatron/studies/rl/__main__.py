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
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.run import keep_settings, quoted
from dsv3_megatron.posttrain.journal import JOURNAL, read_journal
from dsv3_megatron.studies.rl import data
from dsv3_megatron.studies.rl.arm import Arm
from dsv3_megatron.studies.rl.arms import DemoFailed, run_arms
from dsv3_megatron.studies.rl.picture import ARMS, draw

SEQ_LENGTH = 64
GROUP, PROMPTS = 8, 32  # samples of a rollout
ROWS = 64  # of an update, in which they are packed
BASE_DOCUMENTS = 12_000
EVERY = 6  # updates between measurements
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


@dataclass(frozen=True)
class RLSettings:
    """What a run folder is for; a folder begun with other settings is refused."""

    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 24
    base_steps: int = 150
    arms: tuple[str, ...] = tuple(ARMS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.rl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = RLSettings()
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-rl"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds, help="default: 1 2 3")
    parser.add_argument(
        "--steps", type=int, default=default.steps, help="updates of each arm (default: %(default)s)"
    )
    parser.add_argument("--base-steps", type=int, default=default.base_steps, help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=default.arms, help="default: all")
    parser.add_argument(
        "--processes", type=int, default=2, help="arms at the same time (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    settings = RLSettings(tuple(args.seeds), args.steps, args.base_steps, tuple(args.arms))
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the arms, as Ctrl-C does
    try:
        result = run(args.run_dir, settings, args.processes)
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


def run(run_dir: Path, settings: RLSettings, processes: int) -> dict[str, Any]:
    """Base model, arms, picture; returns the result that is printed.

    Raises:
        ValueError: a setting is not possible, or the folder was begun with others.
        DemoFailed: an arm failed.
    """
    if min(*settings.seeds, settings.steps, settings.base_steps, processes) < 1:
        raise ValueError("--seeds, --steps, --base-steps and --processes: must be 1 or more")
    for option, values in (("--seeds", settings.seeds), ("--arms", settings.arms)):
        if len(set(values)) < len(values):
            raise ValueError(f"{option} {' '.join(map(str, values))}: each once")
    run_dir.mkdir(parents=True, exist_ok=True)
    keep_settings(run_dir / "settings.json", settings)
    base = base_arm(run_dir, settings)
    data.write_corpus(base.folder / "corpus", BASE_DOCUMENTS, seed=0)
    run_arms([base], 1)
    keys = [(arm, seed) for seed in settings.seeds for arm in settings.arms]
    arms = {(arm, seed): posttraining_arm(arm, seed, run_dir, settings, base) for arm, seed in keys}
    run_arms(list(arms.values()), processes)
    held_out = {key: arm.held_out() for key, arm in arms.items()}
    journals = {key: read_journal(arm.checkpoints / JOURNAL) for key, arm in arms.items()}
    draw(held_out, journals, run_dir / "reward.png")
    result = summary(held_out, settings.steps)
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
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


def base_arm(run_dir: Path, settings: RLSettings) -> Arm:
    """Pre-training on the documents, and samples of the finished model for the pairs."""
    folder = run_dir / "base"
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
    samples = (settings.seeds, 96, 16) if "dpo" in settings.arms else None
    return Arm("base", folder, settings.base_steps, overrides, every=50, samples=samples)


def posttraining_arm(arm: str, seed: int, run_dir: Path, settings: RLSettings, base: Arm) -> Arm:
    """One way of going on from the base model."""
    folder = run_dir / f"{arm}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = base.folder / "corpus"
    overrides = [
        *MODEL,
        f"recipe={'grpo' if arm in ('rl', 'shuffled') else arm}",
        f"pretrained_checkpoint={quoted(base.checkpoints)}",
        "micro_batch_size=16",
        # The same number of samples for each arm: rows of post-training's other data are full.
        f"global_batch_size={ROWS if arm in ('rl', 'shuffled') else ROWS // 2}",
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
        data.write_demonstrations(
            folder / "rows", tokenizer, GROUP * PROMPTS * settings.steps, SEQ_LENGTH, seed
        )
        overrides += ["data=sft", f"sft_data={quoted(folder / 'rows')}"]
    elif not (folder / "checkpoints").exists():
        data.write_pairs(folder / "pairs", tokenizer, base.sample_file, SEQ_LENGTH, seed)
    if arm == "dpo":
        overrides += [
            "data=preference",
            f"preference_data={quoted(folder / 'pairs')}",
            "preference_epochs=1000",
        ]
    return Arm(f"{arm} {seed}", folder, settings.steps, overrides, EVERY)


if __name__ == "__main__":
    sys.exit(main())
