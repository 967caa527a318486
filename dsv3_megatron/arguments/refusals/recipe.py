"""Schedules by tokens and the batch ramp."""

from argparse import Namespace
from math import gcd

from dsv3_megatron.arguments.refusals.layout import _data_parallel_size, _expert_model_size
from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.recipe.arguments import conflicts, first_sample, ramp_of, schedules_of
from dsv3_megatron.recipe.plan import Phase, Replicas, first_misfit
from dsv3_megatron.recipe.ramp import BatchRamp

FEATURE = "Training recipe"
TOKENS = "--train-tokens"
RAMP = "--batch-ramp"
# The micro model's sequences have 32 tokens.
BASE = "--train-tokens 1e9 --global-batch-size 64"


def replicas_of(a: Namespace, s: Surroundings) -> Replicas:
    """What a global batch is divided over."""
    columns = a.tensor_model_parallel_size * a.context_parallel_size
    experts = _expert_model_size(a) // a.pipeline_model_parallel_size
    return Replicas(
        _data_parallel_size(a, s),
        a.pipeline_model_parallel_size,
        a.pipeline_schedule,
        a.micro_batch_size,
        block=experts // gcd(experts, columns),
    )


def _ramp(a: Namespace) -> BatchRamp | None:
    """The ramp; None too where it does not fit, which has its own row."""
    try:
        return ramp_of(a)
    except ValueError:
        return None


def _misfit(a: Namespace, s: Surroundings) -> Phase | None:
    ramp = _ramp(a)
    return None if ramp is None else first_misfit(ramp, replicas_of(a, s), first_sample(a, ramp))


def _misfit_detail(a: Namespace, s: Surroundings) -> str:
    phase = _misfit(a, s)
    assert phase is not None
    have = replicas_of(a, s).data_parallel_size
    need = (
        f"at most {phase.replicas.data_parallel_size}" if phase.replicas else "a number that does not exist"
    )
    return (
        f"batch size {phase.batch_sizes[0]} from step {phase.first_step} on (sample {phase.first_sample}) needs {need} "
        f"of the {have} data-parallel ranks"
    )


def _wrong_ramp(a: Namespace) -> str:
    try:
        ramp_of(a)
    except ValueError as error:
        return str(error).removeprefix(f"{RAMP} ")
    return ""


ROWS = (
    Refusal(
        "tokens_conflict",
        FEATURE,
        TOKENS,
        "{train_tokens}",
        lambda a, s: bool(conflicts(a)),
        "decides the length of the run, its learning rate and its batch by itself, and other options say otherwise",
        "it without them",
        BASE + " --lr-decay-samples 5",
        without="--train-iters 3",
        detail=lambda a, s: "beside " + ", ".join(conflicts(a)),
    ),
    Refusal(
        "tokens_too_few",
        FEATURE,
        TOKENS,
        "{train_tokens}",
        lambda a, s: (t := schedules_of(a)) is not None and t.num_samples < t.batch_size,
        "is less than one step of --global-batch-size {global_batch_size} sequences of {seq_length} tokens",
        "more tokens or a smaller batch",
        "--train-tokens 1000 --global-batch-size 64",
        without="--train-iters 3",
    ),
    Refusal(
        "recipe_without_tokens",
        FEATURE,
        f"{RAMP} / --last-lr",
        "{batch_ramp} / {last_lr}",
        lambda a, s: a.train_tokens is None and (a.batch_ramp is not None or a.last_lr is not None),
        f"is part of the schedules by tokens, which need {TOKENS}",
        f"{TOKENS} as well",
        "--batch-ramp 4 4",
    ),
    Refusal(
        "wrong_ramp",
        FEATURE,
        RAMP,
        "",
        lambda a, s: bool(_wrong_ramp(a)),
        "the steps of the ramp do not fit",
        "a START below --global-batch-size {global_batch_size} and an INCREMENT that divides the rest of the way",
        BASE + " --batch-ramp 16 7",
        without="--train-iters 3",
        detail=lambda a, s: _wrong_ramp(a),
    ),
    Refusal(
        "ramp_on_layout",
        FEATURE,
        f"{RAMP} / --step-batch-size-schedule",
        "with --pipeline-schedule {pipeline_schedule} on {world_size} processes",
        lambda a, s: _misfit(a, s) is not None,
        "a batch must give every replica whole microbatches, and under dualpipe and dualpipev at least 2 for each of "
        "{pipeline_model_parallel_size} pipeline ranks (both directions together)",
        "fewer processes until then, and --load on more; python -m dsv3_megatron.plan.recipe.ranks shows the phases",
        BASE + " --batch-ramp 4 4 --pipeline-schedule dualpipe --pipeline-model-parallel-size 4",
        without="--train-iters 3",
        detail=_misfit_detail,
    ),
    Refusal(
        "rampup_batch_size",
        FEATURE,
        "--rampup-batch-size",
        "{rampup_batch_size}",
        lambda a, s: a.rampup_batch_size is not None,
        "Megatron ignores this option with only a warning",
        f"{TOKENS} with {RAMP}, or --step-batch-size-schedule",
        "--rampup-batch-size 8 8 100",
    ),
)
