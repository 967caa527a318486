"""Entry point of the group `megatron.plugins`: a patched Megatron-LM (patches/) calls it before it parses.

So `pretrain_gpt.py --spec dsv3` runs with the same arguments as `dsv3_megatron.train --spec dsv3`.
"""

import sys
from argparse import ArgumentParser, Namespace

from dsv3_megatron.arguments.errors import RefusedArgument, exits_cleanly


@exits_cleanly
def complete_command_line(parser: ArgumentParser) -> None:
    """Add our options to Megatron's parser and, for `--spec dsv3`, complete the process's command line.

    Any other command line is left as it is. A wrong one ends the process with a message and exit status 2.
    """
    from dsv3_megatron.arguments.command_line import add_arguments
    from dsv3_megatron.arguments.complete import complete
    from dsv3_megatron.patching import repairs
    from dsv3_megatron.resilience.lock import hold_until_exit

    add_arguments(parser)
    words = sys.argv[1:]
    if "--spec=dsv3" in words or any(words[i : i + 2] == ["--spec", "dsv3"] for i in range(len(words))):
        # Megatron itself refuses words that nobody knows.
        sys.argv[1:] = complete(words, parser, known_only=True)
        args = parser.parse_known_args()[0]
        refuse_what_only_our_trainer_does(args)
        _use_schedule(args)
        hold_until_exit(args.save, args.skip_train, args.rank_timeout_s)
        if args.load is not None or args.pretrained_checkpoint is not None:
            from dsv3_megatron.checkpoint.install import install as begin_with_checkpoint

            begin_with_checkpoint()
        repairs.install()
        if args.train_tokens is not None:
            from dsv3_megatron.recipe.install import install

            install()
        if args.ema_decay is not None or args.eval_ema:
            from dsv3_megatron.ema.trainer import install as keep_average

            keep_average()


def refuse_what_only_our_trainer_does(args: Namespace) -> None:
    options = {
        "--sft-data": args.sft_data,
        "--posttrain": args.posttrain,
        "--loss-spike-factor": args.loss_spike_factor,
    }
    if args.moe_token_dispatcher_type == "two_hop":
        options["--moe-token-dispatcher-type"] = "two_hop"
    if args.eval_tasks is not None:
        options["--eval-tasks"] = " ".join(args.eval_tasks)
    if args.on_bad_step != "stop":
        options["--on-bad-step"] = args.on_bad_step
    for option, value in options.items():
        if value is not None:
            raise RefusedArgument(
                f"{option} {value}: pretrain_gpt.py has its own forward step, data and model builder. "
                "Use python -m dsv3_megatron.train."
            )


def _use_schedule(args: Namespace) -> None:
    """Make `--pipeline-schedule` work in Megatron's own entry point."""
    if args.pipeline_schedule == "1f1b":
        return
    if args.expert_model_parallel_size > 1 and not args.bf16:
        raise RefusedArgument(
            f"--pipeline-schedule {args.pipeline_schedule} with --expert-model-parallel-size "
            f"{args.expert_model_parallel_size}: pretrain_gpt.py gives schedule plans in half precision only. "
            "Use --bf16, or python -m dsv3_megatron.train."
        )
    from dsv3_megatron import dualpipe

    dualpipe.install()
