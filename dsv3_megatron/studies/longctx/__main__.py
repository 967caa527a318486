"""Train a tiny model on 256 tokens, extend it to 2048 in the report's two phases, with YaRN and without, and compare.

    python -m dsv3_megatron.studies.longctx [--run-dir runs/longctx]

The phases are `recipe=longctx_32k` and `longctx_128k` at 1024 and 2048 tokens. What is finished is not trained again.
The last line on stdout is one JSON object: loss of late positions with and without YaRN, and needles found. Exit
status 1 when YaRN does not lower the loss of late answers.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.demo.launch import RunFailed, RunInterrupted, run_ranks
from dsv3_megatron.studies.longctx import needles

# Two layers, the second with experts; positions matter, as the latest of several values is asked for.
MODEL = (
    *("model=micro", "layout=cpu_single", "device=cpu", "mtp_num_layers=0"),
    *(
        "num_layers=2",
        "moe_layer_freq='([0]*1+[1]*1)'",
        "hidden_size=64",
        "ffn_hidden_size=128",
        "init_method_std=0.1",
    ),
    *("num_attention_heads=4", "q_lora_rank=48", "kv_lora_rank=32", "qk_pos_emb_head_dim=16"),
    *("num_experts=4", "moe_router_num_groups=2", "moe_router_group_topk=1"),
    *("moe_ffn_hidden_size=64", "moe_shared_expert_intermediate_size=64"),
)
SHORT = 256
# Recipe, sequence length, steps.
PRETRAIN = ("small", SHORT, 1000)
EXTENSIONS = (("longctx_32k", 1024, 150), ("longctx_128k", 2048, 150))
TOKENS_PER_STEP = 2048
# The tiny model's own learning rates: peak of the pre-training, and constant of the extensions as there a share of it.
LR, LONG_LR = 3e-3, 3e-4
WAYS = {"yarn": f"original_max_position_embeddings={SHORT}", "rope": "rope_type=rope"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.longctx", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/longctx"), help="default: %(default)s")
    folder = parser.parse_args(argv).run_dir
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a demonstration of the CPU runtime
    try:
        train_all(folder)
    except (OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RunInterrupted) as error:
        print(f"interrupted: {error or 'SIGINT'}; the same command goes on", file=sys.stderr)
        return 130
    from dsv3_megatron.studies.longctx.results import draw, summarise, table

    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    draw(results, folder / "longctx.png")
    print(table(results))
    print(f"[demo] picture: {folder / 'longctx.png'}")
    summary = summarise(results)
    print(json.dumps(summary))
    return 0 if summary["late_answer_loss_yarn"] < summary["late_answer_loss_rope"] else 1


def train_all(folder: Path) -> None:
    """Pre-training, then both phases in both ways; each leaves ‹name›.json with its measurements."""
    phase(folder, "pretrain", PRETRAIN, None, [f"lr={LR}", f"min_lr={LR / 10}"])
    for way, override in WAYS.items():
        start = "pretrain"
        for number, extension in enumerate(EXTENSIONS, 1):
            name = f"{way}{number}"
            phase(folder, name, extension, start, [f"lr={LONG_LR}", f"min_lr={LONG_LR}", override])
            start = name


def phase(
    folder: Path, name: str, what: tuple[str, int, int], start: str | None, more: Sequence[str]
) -> None:
    """Train one phase from another's checkpoint, unless its measurements are there."""
    recipe, length, steps = what
    result = folder / f"{name}.json"
    if result.exists():
        return
    batch = TOKENS_PER_STEP // length
    corpus = write_corpus(folder / "corpus" / str(length), length, steps * batch)
    checkpoints = folder / "checkpoints" / name
    overrides: list[Any] = [
        *MODEL,
        f"recipe={recipe}",
        *("data=indexed", f"train_data_path=['{corpus}']", f"valid_data_path=['{corpus}']"),
        *("tokenizer_type=NullTokenizer", "tokenizer_model=null", f"vocab_size={needles.VOCAB_SIZE}"),
        f"data_cache_path='{folder / 'corpus' / 'cache'}'",
        *(f"seq_length={length}", f"max_position_embeddings={length}", f"train_iters={steps}"),
        *(f"global_batch_size={batch}", f"micro_batch_size={batch}", "eval_interval=100000", "eval_iters=1"),
        *(f"save='{checkpoints}'", f"load='{checkpoints}'", "save_interval=200", "log_interval=10"),
        *more,
    ]
    if start is not None:
        overrides.append(f"pretrained_checkpoint='{folder / 'checkpoints' / start}'")
    print(f"[demo] {name}: {steps} steps of {batch} × {length} tokens", flush=True)
    run_ranks("dsv3_megatron.studies.longctx.worker", [str(result), *overrides], 1, folder / "logs" / name)


def write_corpus(folder: Path, length: int, num_sequences: int) -> Path:
    """Megatron's indexed dataset of that many sequences, one document each, so that samples begin with them."""
    prefix = folder / "train"
    if not prefix.with_suffix(".idx").exists():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(length)
        builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=np.uint16)
        for _ in range(num_sequences + 2 * TOKENS_PER_STEP // length):
            builder.add_document(needles.sequence(rng, length).astype(np.uint16), [length])
        builder.finalize(str(prefix.with_suffix(".idx")))
    return prefix


if __name__ == "__main__":
    sys.exit(main())
