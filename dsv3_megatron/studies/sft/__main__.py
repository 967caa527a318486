"""Fine-tune the demo's model on signatures from docstrings, and measure held-out answers before and after.

The last line on stdout is one JSON object; after it comes, on stderr, the command to talk to the model. Pre-trains
first where `--pretrained-run` is not there yet (`make demo`).
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dsv3_megatron.conf import compose
from dsv3_megatron.conf.check import data_parallel_size, world_size
from dsv3_megatron.demo.corpus import standard_library_files
from dsv3_megatron.demo.launch import RunFailed, RunInterrupted, run_ranks
from dsv3_megatron.demo.results import read_curves
from dsv3_megatron.demo.run import SETTINGS_FILE, DemoSettings, quoted, run_demo, saved_iteration
from dsv3_megatron.pipeline.traits import TRAITS
from dsv3_megatron.sft.prepare import prepare, read_report
from dsv3_megatron.studies.sft.instructions import conversations
from dsv3_megatron.studies.sft.picture import draw

BATCH = 16
SEQ_LENGTH = 256
CONVERSATIONS = {"train": 4000, "valid": 500}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.sft", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--pretrained-run", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-sft"), help="default: %(default)s")
    parser.add_argument(
        "--layout", default="cpu_pp2_ep2", help="of dsv3_megatron.conf (default: %(default)s)"
    )
    parser.add_argument("--schedule", default="dualpipe", help="of dsv3_megatron.conf (default: %(default)s)")
    parser.add_argument(
        "--conversations", type=int, default=CONVERSATIONS["train"], help="to train on, at most"
    )
    parser.add_argument("overrides", nargs="*", help="of dsv3_megatron.train_hydra, for instance lr=1e-3")
    args = parser.parse_args(argv)
    try:
        result = run(args)
    except (ValueError, LookupError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RunInterrupted) as error:
        print(f"interrupted: {error or 'SIGINT'}; the same command goes on", file=sys.stderr)
        return 130
    print(f"[demo] picture: {args.run_dir / 'accuracy.png'}")
    print(json.dumps(result), flush=True)
    print(f"[demo] talk to it: {chat_command(args.run_dir)}", file=sys.stderr)  # stdout ends with the JSON
    return 0


def chat_command(run_dir: Path) -> str:
    """The command that talks to the fine-tuned model."""
    return f"dsv3 chat --load {shlex.quote(str(run_dir / 'checkpoints'))} --device cpu"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Pre-train if need be, prepare, fine-tune, draw; returns the result that is printed."""
    from dsv3_megatron.sft.accuracy import bigram_accuracy
    from dsv3_megatron.sft.dataset import PackedRows

    if not saved_iteration(args.pretrained_run / "checkpoints"):
        run_demo(args.pretrained_run, DemoSettings(), more_iters=0)
    pretrained = json.loads((args.pretrained_run / SETTINGS_FILE).read_text())
    args.run_dir.mkdir(parents=True, exist_ok=True)
    data = args.run_dir / "conversations"
    if not (data / "sft.json").exists():
        files = standard_library_files(pretrained["corpus_bytes"])
        found = conversations(
            files, pretrained["valid_fraction"], {**CONVERSATIONS, "train": args.conversations}
        )
        prepare(found, args.pretrained_run / "corpus", data, SEQ_LENGTH)
    report = read_report(data)
    cfg = compose(_overrides(args, data))
    replicas = data_parallel_size(cfg) * TRAITS[cfg.pipeline_schedule or "1f1b"].directions
    unit = replicas * cfg.micro_batch_size * max(2, cfg.pipeline_model_parallel_size)
    num_rows = report["valid"]["rows"] // unit * unit
    if not num_rows:
        raise ValueError(
            f"{report['valid']['rows']} held-out rows are fewer than the {unit} of one evaluation"
        )
    print(
        f"[demo] {report['train']['conversations']} conversations in {report['train']['rows']} rows",
        flush=True,
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the ranks: the demo is one of the CPU runtime
    accuracy_file = args.run_dir / "accuracy.json"
    words = [
        "--data",
        str(data),
        "--num-rows",
        str(num_rows),
        "--every",
        "20",
        "--accuracy-file",
        str(accuracy_file),
    ]
    run_ranks(
        "dsv3_megatron.studies.sft.worker",
        [*words, *_overrides(args, data)],
        world_size(cfg),
        args.run_dir / "logs",
    )

    curve = {int(step): value for step, value in json.loads(accuracy_file.read_text()).items()}
    first, last = curve[0], curve[max(curve)]
    train_rows = PackedRows(data, "train", report["train"]["rows"], seed=0)
    result = {
        "token_accuracy_before": first["token_accuracy"],
        "token_accuracy_after": last["token_accuracy"],
        "exact_match_before": first["exact_match"],
        "exact_match_after": last["exact_match"],
        "bigram_accuracy": bigram_accuracy(train_rows, PackedRows(data, "valid", num_rows, seed=0)),
        "train_conversations": report["train"]["conversations"],
        "valid_rows": num_rows,
        "iteration": max(curve),
    }
    draw(curve, read_curves(args.run_dir / "tensorboard"), result, args.run_dir / "accuracy.png")
    (args.run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _overrides(args: argparse.Namespace, data: Path) -> list[str]:
    """The overrides of `dsv3_megatron.train_hydra`: the recipe, with a learning rate and a batch for a small model."""
    checkpoints = quoted(args.run_dir / "checkpoints")
    return [
        "model=tiny",
        "recipe=sft",
        f"layout={args.layout}",
        f"schedule={args.schedule}",
        "data=sft",
        "device=cpu",
        f"sft_data={quoted(data)}",
        f"pretrained_checkpoint={quoted(args.pretrained_run / 'checkpoints')}",
        f"save={checkpoints}",
        f"load={checkpoints}",
        "save_interval=50",
        f"seq_length={SEQ_LENGTH}",
        f"max_position_embeddings={SEQ_LENGTH}",
        f"global_batch_size={BATCH}",
        "lr=1e-3",  # as much above the report's as the demo's pre-training is
        "min_lr=2e-4",
        f"tensorboard_dir={quoted(args.run_dir / 'tensorboard')}",
        "tensorboard_log_interval=1",
        "log_interval=1",
        *args.overrides,
    ]


if __name__ == "__main__":
    sys.exit(main())
