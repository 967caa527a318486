"""Length of a run, its learning rate, its evaluations: what Megatron would find out after the model is built."""

from argparse import Namespace

from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.refusals.layout import _data_parallel_size
from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.checkpoint.schedule import planned
from dsv3_megatron.recipe.arguments import conflicts, schedules_of

LENGTH, RATE, EVALUATION = "Length of a run", "Learning rate", "Evaluation"
BY_SAMPLES = "--train-samples 24"
WITHOUT_ITERS = "--train-iters 3"


def check_length(args: Namespace) -> None:
    """Refuse a run without length. The table does not: a line may be completed before its length is known.

    Raises:
        RefusedArgument: nothing says how long the run is.
    """
    if not args.train_iters and not args.train_samples:
        raise RefusedArgument(
            "--train-iters: nothing says how long the run is (--skip-train needs it too, for the size of the data "
            "sets). Use --train-iters N, --train-samples N or --train-tokens N."
        )


def _constants(a: Namespace, s: Surroundings) -> dict | None:
    """The schedule's constants, None where there is no length or other rows have their say."""
    if a.skip_train or _mixed(a) or (a.train_iters and a.train_samples) or conflicts(a):
        return None
    return planned(a, _data_parallel_size(a, s))


def _mixed(a: Namespace) -> list[str]:
    """Options that count in the other unit than the run."""
    if a.skip_train or schedules_of(a) is not None:
        return []
    in_samples = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")
    in_iters = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
    wrong = in_samples if a.train_iters else in_iters if a.train_samples else ()
    return ["--" + name.replace("_", "-") for name in wrong if getattr(a, name)]


def _warmup(a: Namespace, s: Surroundings) -> tuple[float, float] | None:
    constants = _constants(a, s)
    return None if constants is None else (constants["lr_warmup_steps"], constants["lr_decay_steps"])


def _grows(a: Namespace) -> bool:
    return a.weight_decay_incr_style != "constant"


def _wsd(a: Namespace, s: Surroundings) -> str:
    """What is wrong with the decay of warm-up, stable, decay."""
    constants = _constants(a, s)
    if constants is None or a.lr_decay_style != "WSD":
        return ""
    if constants["wsd_decay_steps"] is None:
        return "its last part has no length"
    if constants["wsd_decay_steps"] > constants["lr_decay_steps"] - constants["lr_warmup_steps"]:
        return "its last part is longer than what is left after the warm-up"
    return ""


ROWS = (
    Refusal(
        "two_lengths",
        LENGTH,
        "--train-iters / --train-samples",
        "{train_iters} / {train_samples}",
        lambda a, s: bool(a.train_iters and a.train_samples) and not conflicts(a),
        "the length is given twice",
        "one of the two",
        BY_SAMPLES,
    ),
    Refusal(
        "other_unit",
        LENGTH,
        "--train-iters / --train-samples",
        "{train_iters} / {train_samples}",
        lambda a, s: bool(_mixed(a)) and not (a.train_iters and a.train_samples),
        "the length is counted in another unit than other options",
        "the same unit for all: --…-iters or --…-samples",
        "--lr-warmup-samples 8",
        detail=lambda a, s: ", ".join(_mixed(a)),
    ),
    Refusal(
        "two_warmups",
        RATE,
        "--lr-warmup-fraction",
        "{lr_warmup_fraction}",
        lambda a, s: a.lr_warmup_fraction is not None and bool(a.lr_warmup_iters or a.lr_warmup_samples),
        "the warm-up is given twice",
        "it, or --lr-warmup-iters (--lr-warmup-samples)",
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 1",
    ),
    Refusal(
        "warmup_too_long",
        RATE,
        "--lr-warmup-iters / --lr-warmup-samples / --lr-warmup-fraction",
        "{lr_warmup_iters} / {lr_warmup_samples} / {lr_warmup_fraction}",
        lambda a, s: (steps := _warmup(a, s)) is not None and steps[0] >= steps[1],
        "the warm-up is not shorter than the whole schedule",
        "a shorter warm-up, or a larger --lr-decay-iters or --train-iters",
        "--lr-warmup-iters 3",
        detail=lambda a, s: "{:g} of {:g} samples".format(*(_warmup(a, s) or (0, 0))),
    ),
    Refusal(
        "wsd_decay",
        RATE,
        "--lr-decay-style",
        "{lr_decay_style}",
        lambda a, s: bool(_wsd(a, s)),
        "the schedule does not fit",
        "--lr-wsd-decay-iters (--lr-wsd-decay-samples) below the rest of the run",
        "--lr-decay-style WSD",
        detail=_wsd,
    ),
    Refusal(
        "rates_in_order",
        RATE,
        "--min-lr / --lr-warmup-init",
        "{min_lr} / {lr_warmup_init}",
        lambda a, s: a.lr is not None and max(a.min_lr or 0, a.lr_warmup_init) > a.lr,
        "is above the peak --lr {lr}",
        "at most the peak",
        "--min-lr 1e-2",
    ),
    Refusal(
        "decoupled_by_tokens",
        RATE,
        "--decoupled-lr",
        "{decoupled_lr}",
        lambda a, s: a.decoupled_lr is not None and a.train_tokens is not None,
        "the last phase of --train-tokens has one learning rate for all weights",
        "it without --train-tokens",
        "--decoupled-lr 1e-4 --train-tokens 100000",
        without=WITHOUT_ITERS,
    ),
    Refusal(
        "weight_decay_constant",
        RATE,
        "--weight-decay-incr-style",
        "{weight_decay_incr_style}",
        lambda a, s: not _grows(a) and (a.start_weight_decay is not None or a.end_weight_decay is not None),
        "--start-weight-decay and --end-weight-decay say that the weight decay grows",
        "linear or cosine with them, or --weight-decay alone",
        "--start-weight-decay 0.05",
    ),
    Refusal(
        "weight_decay_grows",
        RATE,
        "--weight-decay-incr-style",
        "{weight_decay_incr_style}",
        lambda a, s: (
            _grows(a)
            and (
                a.start_weight_decay is None
                or a.end_weight_decay is None
                or a.end_weight_decay < a.start_weight_decay
            )
        ),
        "the weight decay grows from --start-weight-decay {start_weight_decay} to "
        "--end-weight-decay {end_weight_decay}",
        "both, the second at least as large as the first",
        "--weight-decay-incr-style linear",
    ),
    Refusal(
        "full_validation",
        EVALUATION,
        "--full-validation",
        "",
        lambda a, s: a.full_validation and not a.multiple_validation_sets,
        "Megatron fails at the first evaluation without --multiple-validation-sets",
        "--multiple-validation-sets as well, also for one set, with --valid-data-path",
        "--full-validation",
    ),
    Refusal(
        "multiple_validation_sets",
        EVALUATION,
        "--multiple-validation-sets",
        "",
        lambda a, s: (
            a.multiple_validation_sets
            and (not a.full_validation or (a.valid_data_path is None and a.per_split_data_args_path is None))
        ),
        "needs sets of its own, which are gone through as a whole",
        "--full-validation and --valid-data-path (or --per-split-data-args-path) as well",
        "--multiple-validation-sets",
    ),
    Refusal(
        "eval_batch",
        EVALUATION,
        "--eval-global-batch-size",
        "{eval_global_batch_size}",
        lambda a, s: _uneven_eval(a, s),
        "is not divisible by --eval-micro-batch-size {eval_micro_batch_size} "
        "(or --micro-batch-size {micro_batch_size}) × data-parallel size",
        "a multiple of that",
        "--eval-global-batch-size 9",
    ),
)


def _uneven_eval(a: Namespace, s: Surroundings) -> bool:
    batch = a.eval_global_batch_size or a.global_batch_size
    if batch is None or (a.eval_global_batch_size is None and a.eval_micro_batch_size is None):
        return False
    return batch % ((a.eval_micro_batch_size or a.micro_batch_size) * _data_parallel_size(a, s)) != 0
