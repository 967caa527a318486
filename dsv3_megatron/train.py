"""Train a DeepSeek-V3 through `megatron.training.pretrain`.

    torchrun --nproc-per-node 8 -m dsv3_megatron.train --spec dsv3 <ordinary Megatron arguments>
    torchrun --nproc-per-node 4 -m dsv3_megatron.train --spec dsv3 --device cpu <ordinary Megatron arguments>

Every DeepSeek-V3 setting that is not given is filled in; contradictions and unsupported combinations are
refused before anything is built (docs/support.md).
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from dsv3_megatron.arguments.device import split_device
from dsv3_megatron.errors import RefusedArgument, ends_in_one_line


def report(error: Exception) -> str:
    """The line of an exception of Megatron's, see `arguments.failures`."""
    from dsv3_megatron.arguments.failures import report

    return report(error)


@ends_in_one_line(report)
def command() -> None:
    """Entry point of `python -m dsv3_megatron.train`."""
    main()


def main(argv: Sequence[str] | None = None, **pretrain_options: Any) -> dict[str, Any]:
    """Train with these command-line words (default: those of this process).

    Args:
        pretrain_options: further keywords of `megatron.training.pretrain`, for instance `non_loss_data_func`.

    Returns:
        `{"iteration": last iteration, "consumed_train_samples": samples seen}`.

    Raises:
        RefusedArgument: the command line is wrong; nothing has been built then.
    """
    started = time.time()
    device, words = split_device(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        _help()
    words = _use_device(device, words)

    from dsv3_megatron.arguments import complete

    with _command_line(complete(words)):
        return _train(started, pretrain_options)


def _train(started: float, pretrain_options: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain, set_startup_timestamps
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from dsv3_megatron import dispatch, dualpipe, expert_placement, metrics, optimizer, patching, resilience
    from dsv3_megatron.arguments import add_arguments, megatron_parser
    from dsv3_megatron.arguments.failures import explain
    from dsv3_megatron.arguments.refusals.length import check_length
    from dsv3_megatron.checkpoint.install import install as begin_with_checkpoint
    from dsv3_megatron.ema.trainer import install as keep_average
    from dsv3_megatron.evaluation.live import install as evaluate_tasks
    from dsv3_megatron.patching import repairs
    from dsv3_megatron.posttrain.arguments import check as check_posttrain
    from dsv3_megatron.posttrain.install import install as posttrain
    from dsv3_megatron.recipe.install import install as follow_schedules
    from dsv3_megatron.resilience.lock import held
    from dsv3_megatron.resilience.watch import watching
    from dsv3_megatron.sft.arguments import check as check_sft_data
    from dsv3_megatron.sft.dataset import install as read_conversations
    from dsv3_megatron.specs.builder import DSV3ModelConfig
    from dsv3_megatron.training.datasets import embedding_ranks, train_valid_test_datasets
    from dsv3_megatron.training.step import forward_step

    repairs.install()
    dualpipe.install()
    dispatch.install()
    expert_placement.install()
    set_startup_timestamps(program_start=started, main_entry=time.time())
    optimizer.install()
    metrics.install()
    follow_schedules()
    begin_with_checkpoint()
    keep_average()
    read_conversations()
    posttrain()
    patching.install(["build_pretraining_data_loader"])
    try:
        args = parse_and_validate_args(extra_args_provider=add_arguments)
        check_length(args)
        check_sft_data(args)
        evaluate_tasks(args)
        check_posttrain(args)
        resilience.install(args)
        model = gpt_config_from_args(args, model_config_cls=DSV3ModelConfig)
        model.seed = args.seed
        config = pretrain_cfg_container_from_args(args, model)
    except RefusedArgument:
        raise
    except Exception as error:
        # Megatron checks arguments with assertions: what they say is for the user to read, not a crash.
        raise RefusedArgument(
            f"Megatron refuses these arguments: {explain(error, megatron_parser())}"
        ) from error
    writes = args.save is not None and not args.skip_train
    hold = held(Path(args.save), args.rank, args.rank_timeout_s) if writes else nullcontext()
    with hold, watching(args.rank_timeout_s):
        pretrain(
            config,
            train_valid_test_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=embedding_ranks,
            **pretrain_options,
        )
    args = get_args()
    return {"iteration": _last_iteration(args), "consumed_train_samples": args.consumed_train_samples}


def _last_iteration(args: Any) -> int:
    """Steps done since the beginning; `args.iteration` is where a checkpoint left off."""
    trained = args.do_train and not args.skip_train and args.iteration < args.train_iters
    return args.curr_iteration + 1 if trained else args.iteration


def _help() -> NoReturn:
    from dsv3_megatron.arguments import megatron_parser

    megatron_parser().print_help()
    print((__doc__ or "").strip())
    raise SystemExit(0)


def _use_device(device: str, words: list[str]) -> list[str]:
    """Activate the CPU runtime and add the options it needs, or make sure that there is a GPU."""
    import torch

    from dsv3_megatron import cpu

    if device == "cuda" and not cpu.is_active():
        if not torch.cuda.is_available():
            raise RefusedArgument("--device cuda (the default): no GPU is visible. Use --device cpu.")
        return words
    if not cpu.is_active() and torch.cuda.is_available():
        raise RefusedArgument(
            "--device cpu: a GPU is visible. Hide it with CUDA_VISIBLE_DEVICES='', or leave it out."
        )
    cpu.activate()
    return [*_options_not_in(words, cpu.CPU_FLAGS), *words]


def _options_not_in(words: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """The options of `flags`, each with its values, that `words` does not give."""
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    keep = False
    for flag in flags:
        if flag.startswith("--"):
            keep = flag not in given
        if keep:
            yield flag


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Megatron parses `sys.argv`."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    command()
