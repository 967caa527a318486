"""`--posttrain dpo|grpo` and its options, and what they mean as Megatron's own arguments."""

import math
import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.posttrain.bridge import split_address
from dsv3_megatron.posttrain.policy_loss import REDUCTIONS
from dsv3_megatron.posttrain.preference_loss import LOSSES
from dsv3_megatron.posttrain.texts import TEXT_BEGINS
from dsv3_megatron.rewards import resolve

METHODS = ("dpo", "grpo")


def add_arguments(parser: ArgumentParser) -> None:
    """Add our options to Megatron's parser."""
    group = parser.add_argument_group("dsv3 post-training")
    add = group.add_argument
    add("--posttrain", choices=METHODS, help="learn from preferences (dpo) or from rewards (grpo)")
    add(
        "--posttrain-mtp-loss",
        action=BooleanOptionalAction,
        default=False,
        help="the MTP layer learns too: chosen answers under dpo, all rollouts under grpo (default: no)",
    )
    dpo = parser.add_argument_group("dsv3 preferences (--posttrain dpo)").add_argument
    dpo("--preference-data", metavar="DIR", help="packed pairs, a folder by dsv3 preferences")
    dpo(
        "--preference-epochs",
        type=int,
        default=1,
        help="how often the pairs are gone through (default: %(default)s)",
    )
    dpo("--dpo-beta", type=float, default=0.1, help="strength of the reference (default: %(default)s, TRL's)")
    dpo("--dpo-loss", choices=LOSSES, default=LOSSES[0], help="default: %(default)s")
    dpo(
        "--dpo-label-smoothing",
        type=float,
        default=0.0,
        help="share of pairs taken to be labelled the wrong way round (default: %(default)s)",
    )
    dpo(
        "--dpo-length-normalized",
        action=BooleanOptionalAction,
        default=False,
        help="log-ratios are divided by the answers' lengths (default: no)",
    )
    dpo(
        "--dpo-reference",
        choices=("cached", "live"),
        default="cached",
        help="the reference's log-probabilities: computed once and kept in a file, or at each step from a copy of the "
        "weights (default: %(default)s)",
    )
    dpo("--dpo-reference-dir", metavar="DIR", help="where they are kept (default: --preference-data)")
    grpo = parser.add_argument_group("dsv3 rewards (--posttrain grpo)").add_argument
    grpo("--prompt-data", metavar="FILE", help='JSON Lines of {"prompt", "answer"}')
    grpo(
        "--reward",
        metavar="NAME",
        help="module:function, reward(prompt, response, answer) -> float; a shipped one; or name=weight,… of several",
    )
    grpo(
        "--samples-per-prompt",
        type=int,
        default=16,
        metavar="G",
        help="size of a group (default: %(default)s)",
    )
    grpo("--prompts-per-rollout", type=int, default=32, help="groups of a rollout (default: %(default)s)")
    grpo("--max-response-length", type=int, default=1024, help="tokens at most (default: %(default)s)")
    grpo(
        "--rollout-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="π is softmax(logits / T) for the engine that draws, the trainer and the reference (default: %(default)s)",
    )
    grpo(
        "--updates-per-rollout",
        type=int,
        default=1,
        help="steps on a rollout; 1 is on policy (default: %(default)s)",
    )
    grpo("--reward-timeout", type=float, default=60.0, help="seconds for one reward (default: %(default)s)")
    grpo(
        "--rollout-batch",
        type=int,
        default=64,
        help="requests that a rank generates at once (default: %(default)s)",
    )
    grpo(
        "--rollout-address",
        metavar="HOST:PORT",
        help="where this job's first rank waits for another job, dsv3 rollouts --connect HOST:PORT, that draws the "
        "responses (default: the trainer's own ranks do)",
    )
    grpo("--policy-clip", type=float, default=0.2, help="ε of the clipped ratio (default: %(default)s)")
    grpo(
        "--policy-beta",
        type=float,
        default=0.04,
        help="β of the KL penalty; 0: no reference (default: %(default)s)",
    )
    grpo(
        "--policy-reduction",
        choices=REDUCTIONS,
        default=REDUCTIONS[0],
        help="mean over (default: %(default)s)",
    )
    grpo(
        "--advantage-deviation",
        choices=("population", "sample"),
        default="population",
        help="which standard deviation divides a group's rewards (default: %(default)s)",
    )
    grpo(
        "--importance-limit",
        type=float,
        default=2.0,
        help="truncation of π_trainer / π_engine; 0: do not correct (default: %(default)s)",
    )
    grpo("--renew-reference", type=int, default=0, metavar="STEPS", help="0: the reference stays (default)")
    grpo(
        "--routing-replay",
        action=BooleanOptionalAction,
        default=False,
        help="the experts that the engine chose for a rollout are used again in training (default: no)",
    )
    grpo(
        "--text-begin",
        choices=TEXT_BEGINS,
        default=TEXT_BEGINS[0],
        help="the token before a prompt of text: the begin token, or the end token of the document before it, which is "
        "what a model trained on dsv3 data's documents has seen (default: %(default)s)",
    )
    grpo(
        "--shuffle-rewards",
        action=BooleanOptionalAction,
        default=False,
        help="a control: rewards are dealt out anew among the samples of a rollout, so that there is nothing to learn",
    )
    grpo(
        "--bad-reward",
        type=float,
        default=0.0,
        help="of a sample whose reward raises, is NaN, takes too long or loses its process (default: %(default)s)",
    )


def report_of(args: Namespace) -> dict[str, Any] | None:
    """What the folder of `--preference-data` holds; None without the option, or where there is no such folder."""
    from dsv3_megatron.posttrain.prepare import read_report

    if getattr(args, "preference_data", None) is None:
        return None
    try:
        return read_report(Path(args.preference_data))
    except (OSError, ValueError):
        return None  # refused by the table, which names the option


def train_iters(args: Namespace) -> int | None:
    """Steps of all epochs over the pairs; what is left of the last batch is not trained on."""
    report, batch = report_of(args), getattr(args, "global_batch_size", None)
    if report is None or not batch:
        return None
    return max(1, report["train"]["rows"] * getattr(args, "preference_epochs", 1) // batch)


def check(args: Namespace) -> None:
    """Whether numbers and data of post-training fit each other; Megatron has validated the rest.

    Raises:
        RefusedArgument: they do not.
    """
    if args.posttrain == "dpo":
        _check_preferences(args)
    elif args.posttrain == "grpo":
        _check_policy(args)


def _check_preferences(args: Namespace) -> None:
    report = report_of(args)
    assert report is not None, "refused by the table"
    _at_least(args, ("preference_epochs", 1))
    if args.seq_length != report["seq_length"]:
        raise RefusedArgument(
            f"--seq-length {args.seq_length}: the rows of --preference-data {args.preference_data} have "
            f"{report['seq_length']} tokens. Leave it out, or prepare the pairs for that length"
        )
    rows = report["train"]["rows"] * args.preference_epochs
    if rows < args.global_batch_size:
        raise RefusedArgument(
            f"--global-batch-size {args.global_batch_size}: --preference-data {args.preference_data} has {rows} rows "
            f"in {args.preference_epochs} epochs. Use a smaller batch"
        )
    if args.eval_iters and not report["valid"]["rows"]:
        raise RefusedArgument(
            f"--eval-iters {args.eval_iters}: --preference-data {args.preference_data} has no held-out pairs. Use 0, "
            "or prepare the pairs with a larger --valid-fraction"
        )
    _check_reference_dir(args)
    if not (args.dpo_beta > 0 and math.isfinite(args.dpo_beta)):
        raise RefusedArgument(f"--dpo-beta {args.dpo_beta}: must be above 0")
    if not 0 <= args.dpo_label_smoothing < 0.5:
        raise RefusedArgument(
            f"--dpo-label-smoothing {args.dpo_label_smoothing}: must be at least 0 and below 0.5"
        )


def _check_reference_dir(args: Namespace) -> None:
    """All pairs are scored before the reference is written: a folder that cannot take it is refused before that."""
    option = "--preference-data" if args.dpo_reference_dir is None else "--dpo-reference-dir"
    folder = Path(args.dpo_reference_dir or args.preference_data)
    if args.dpo_reference != "cached" or any(folder.glob("reference_*.npy")):
        return
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise RefusedArgument(
            f"{option} {folder}: --dpo-reference cached cannot write there. Use --dpo-reference-dir with a folder that "
            "can be written"
        )


def _check_policy(args: Namespace) -> None:
    _at_least(
        args,
        ("samples_per_prompt", 2),
        ("prompts_per_rollout", 1),
        ("max_response_length", 1),
        ("updates_per_rollout", 1),
        ("rollout_batch", 1),
        ("renew_reference", 0),
        ("policy_beta", 0),
        ("importance_limit", 0),
    )
    for name in ("policy_clip", "reward_timeout", "rollout_temperature"):
        value = getattr(args, name)
        unlimited = value == math.inf and name == "policy_clip"  # ratios are not clipped
        if not 0 < value < math.inf and not unlimited:
            raise RefusedArgument(f"--{name.replace('_', '-')} {value}: must be above 0, and finite")
    if not math.isfinite(args.bad_reward):
        raise RefusedArgument(f"--bad-reward {args.bad_reward}: must be a number")
    if args.rollout_address is not None:
        try:
            split_address(args.rollout_address)
        except RefusedArgument as error:
            raise RefusedArgument(f"--rollout-address {error}") from None
    if args.rollout_batch % args.tensor_model_parallel_size:
        raise RefusedArgument(
            f"--rollout-batch {args.rollout_batch}: must be a multiple of --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size}"
        )
    samples = args.samples_per_prompt * args.prompts_per_rollout
    rows = args.global_batch_size * args.updates_per_rollout
    if samples % rows:
        raise RefusedArgument(
            f"--samples-per-prompt {args.samples_per_prompt} × --prompts-per-rollout {args.prompts_per_rollout}: "
            f"{samples} samples do not divide into --global-batch-size {args.global_batch_size} × "
            f"--updates-per-rollout {args.updates_per_rollout} rows. Use a multiple of {rows}"
        )
    try:
        resolve(args.reward)
    except RefusedArgument as error:
        raise RefusedArgument(f"--reward {args.reward}: {error}") from None


def _at_least(args: Namespace, *bounds: tuple[str, float]) -> None:
    for name, least in bounds:
        value = getattr(args, name)
        if not (value >= least and math.isfinite(value)):
            raise RefusedArgument(f"--{name.replace('_', '-')} {value}: must be {least} or more")


def samples_per_row(args: Namespace) -> int:
    """Rollouts that a row of training holds."""
    samples: int = args.samples_per_prompt * args.prompts_per_rollout
    return samples // (args.global_batch_size * args.updates_per_rollout)
