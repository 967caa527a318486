"""What fine-tuning needs, and what cannot be combined with it."""

from argparse import Namespace
from pathlib import Path

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.sft.arguments import report_of

FEATURE = "Fine-tuning"
DATA = "--sft-data"
EXAMPLE = "--sft-data nowhere"


def _on(a: Namespace) -> bool:
    return a.sft_data is not None


def _has_checkpoint(a: Namespace) -> bool:
    tracker = "latest_checkpointed_iteration.txt"
    folders = (a.pretrained_checkpoint, a.load)
    return any(folder is not None and (Path(folder) / tracker).is_file() for folder in folders)


ROWS = (
    Refusal(
        "sft_without_data",
        FEATURE,
        "--sft",
        "",
        lambda a, s: a.sft and not _on(a) and a.posttrain is None,
        "Megatron's own data set for fine-tuning knows other chat formats than DeepSeek-V3's",
        "--sft-data DIR, which sets it",
        "--sft",
    ),
    Refusal(
        "sft_folder",
        FEATURE,
        DATA,
        "{sft_data}",
        lambda a, s: _on(a) and report_of(a) is None,
        "there are no packed conversations (or their preparation was interrupted)",
        "a folder by python -m dsv3_megatron.sft.prepare",
        EXAMPLE,
    ),
    Refusal(
        "sft_other_data",
        FEATURE,
        DATA,
        "{sft_data}",
        lambda a, s: _on(a) and bool(a.mock_data or a.data_path or a.train_data_path),
        "data for pre-training was given as well",
        "one of the two",
        EXAMPLE,
    ),
    Refusal(
        "sft_without_checkpoint",
        FEATURE,
        DATA,
        "{sft_data}",
        lambda a, s: _on(a) and not _has_checkpoint(a),
        "fine-tuning begins with a checkpoint, and there is none in --load or --pretrained-checkpoint",
        "--pretrained-checkpoint DIR (and --load for where this run saves, to go on after an interruption)",
        EXAMPLE,
    ),
    Refusal(
        "sft_context_parallel",
        FEATURE,
        "--context-parallel-size",
        "{context_parallel_size}",
        lambda a, s: _on(a) and a.context_parallel_size > 1,
        f"{DATA} packs samples of any length, which cannot be cut into equal chunks for each rank",
        "1",
        EXAMPLE + " --context-parallel-size 2",
    ),
)
