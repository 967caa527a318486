"""Short training runs of Megatron's own GPT through `megatron.training.pretrain`, on ranks of the harness."""

import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

from dsv3_megatron.cpu import CPU_FLAGS, record_streams
from tests.harness import run_distributed

_GPT = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 1e-2 --min-lr 1e-3 --log-interval 1 "
    "--eval-iters 0 --eval-interval 100 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"
)
_MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
)
GPT, MOE = _GPT.split(), _MOE.split()


def pretrain(
    rank: int, world_size: int, words: list[str], record: bool = False, fill: bool = False
) -> dict[str, Any]:
    """The calls of Megatron's `pretrain_gpt.py`; returns what `record_streams` saw, or an exit code.

    fill: new memory holds NaN, so that what is saved without having been written is equal in each run.
    """
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from dsv3_megatron.training.datasets import embedding_ranks, train_valid_test_datasets
    from dsv3_megatron.training.step import forward_step

    torch.use_deterministic_algorithms(fill, warn_only=True)
    sys.argv = ["pretrain", *words]
    # As in a process of its own; the harness' fork server left another default for data-loading workers.
    multiprocessing.set_start_method("fork", force=True)

    def run() -> None:
        args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(
            config,
            train_valid_test_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=embedding_ranks,
        )

    try:
        if not record:
            run()
            return {}
        with record_streams() as streams:
            run()
        return {
            "violations": [str(violation) for violation in streams.violations],
            "num_operations": sorted(n for s, n in streams.num_operations.items() if not isinstance(s, str)),
        }
    except SystemExit as exit:
        return {"exit_code": exit.code}


def pretrain_without_waits(rank: int, world_size: int, words: list[str]) -> dict[str, Any]:
    """As `pretrain` with a record, of a Megatron whose schedule nodes have forgotten to wait."""
    from contextlib import contextmanager

    import torch
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    @contextmanager
    def no_wait(self, name=None):
        with torch.cuda.stream(self.stream):
            yield
        self.event.record(self.stream)

    ScheduleNode.stream_acquire_context = no_wait
    return pretrain(rank, world_size, words, record=True)


def train(folder: Path, world_size: int, *words: str, fn: Any = pretrain, **kwargs: Any) -> tuple[list, list]:
    """(loss and gradient norm of each step as Megatron prints them, what each rank returned)."""
    folder.mkdir(parents=True, exist_ok=True)
    words_ = [*CPU_FLAGS, *GPT, *words]
    returned = run_distributed(
        fn, world_size=world_size, timeout=240, init=False, log_dir=folder, words=words_, **kwargs
    )
    log = (folder / f"rank{world_size - 1}.log").read_text()
    return re.findall(r"lm loss: (\S+) \|.*?grad norm: (\S+) \|", log), returned
