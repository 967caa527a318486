"""The checkpoint that a run begins with: is it there, and is it this model's?"""

from argparse import Namespace
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv3_megatron.arguments.refusals.layout import _data_parallel_size
from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.checkpoint import model, schedule, vocabulary
from dsv3_megatron.checkpoint.arguments import SEQ_LENGTH, UNRECORDED, possible_changes
from dsv3_megatron.checkpoint.model import Difference
from dsv3_megatron.checkpoint.recorded import Recorded
from dsv3_megatron.checkpoint.start import Start, begins_where_it_saves, has_checkpoint, start_of

FEATURE = "Checkpoints"
CHANGES = "--checkpoint-changes"
BY_TOKENS = "last_phase"


def _start(a: Namespace, s: Surroundings) -> Start | None:
    if a.load is None and a.pretrained_checkpoint is None:
        return None
    if s.checkpoint is not None:
        return s.checkpoint
    return start_of(a) if s.files_here else None


def _imagined(problem: str = "", scheduler: dict[str, Any] | None = None, **recorded: Any) -> Surroundings:
    """A machine with a checkpoint that records these arguments, for the examples."""
    folder = Path("trained") / "iter_0000004"
    args = Namespace(**recorded) if recorded else None
    found = None if problem else Recorded(folder, 4, args, scheduler)
    return Surroundings(world_size=8, checkpoint=Start("--load", folder.parent, found, not problem, problem))


def _named(a: Namespace) -> set[str]:
    return set(a.checkpoint_changes)


def _other_arguments(a: Namespace, s: Surroundings) -> list[Difference]:
    """Arguments of the model that differ from the checkpoint's and are not said to."""
    start = _start(a, s)
    if start is None or start.recorded is None or start.recorded.args is None:
        return []
    recorded = start.recorded.args
    found = model.differences(recorded, a)
    tokens = vocabulary.difference(recorded, a)
    before = getattr(recorded, SEQ_LENGTH, None)
    if before is not None and before != a.seq_length:
        found.append(Difference(SEQ_LENGTH, "--seq-length", str(before), str(a.seq_length), False))
    return [d for d in [*found, *([tokens] if tokens else [])] if d.shapes or d.dest not in _named(a)]


def _remedy(a: Namespace, s: Surroundings) -> str:
    found = _other_arguments(a, s)
    may = [d.dest for d in found if not d.shapes]
    text = "the checkpoint's values"
    if len(found) > 1:
        text += " (--model-from-checkpoint takes those that are not given)"
    if may:
        text += f", or {CHANGES} {' '.join(may)} where the difference is meant"
    return text


def _differing(a: Namespace, s: Surroundings) -> str:
    return ", ".join(map(str, _other_arguments(a, s)))


def _counts_other_tokens(a: Namespace, s: Surroundings) -> bool:
    start = _start(a, s)
    if start is None or start.recorded is None or start.recorded.args is None or a.skip_train:
        return False
    before = getattr(start.recorded.args, SEQ_LENGTH, a.seq_length)
    return start.goes_on and SEQ_LENGTH in _named(a) and before != a.seq_length


def _optimizer_of_other_layers(a: Namespace, s: Surroundings) -> bool:
    start = _start(a, s)
    if (
        start is None
        or start.recorded is None
        or start.recorded.args is None
        or not _loads_optimizer(a, start)
    ):
        return False
    field = model.BY_DEST["mtp_num_layers"]
    return field.dest in _named(a) and field.value(start.recorded.args) != field.value(a)


def _loads_optimizer(a: Namespace, start: Start) -> bool:
    return start.goes_on and not a.no_load_optim and not a.skip_train


def _is_missing(a: Namespace, s: Surroundings) -> bool:
    """A folder to load from that has nothing to load; a first start finds the folder in which it saves empty."""
    start = _start(a, s)
    if not s.files_here or a.load is None or (start is not None and start.option == "--load"):
        return False
    return not begins_where_it_saves(a) or (a.skip_train and start is None)


def _state(folder: str) -> str:
    return "holds no checkpoint" if Path(folder).is_dir() else "does not exist"


def _other_schedule(a: Namespace, s: Surroundings) -> list[str]:
    start = _start(a, s)
    if start is None or start.recorded is None or not start.goes_on or a.skip_train:
        return []
    recorded = schedule.of_checkpoint(start.recorded)
    now = schedule.planned(a, _data_parallel_size(a, s))
    if recorded is None or now is None or a.override_opt_param_scheduler:
        return []
    if a.use_checkpoint_opt_param_scheduler:  # our fifth phase needs our scheduler, which the option brings
        return (
            ["--train-tokens (this run has none)"] if BY_TOKENS in recorded and BY_TOKENS not in now else []
        )
    return [] if a.no_load_optim else schedule.differences(recorded, now)


def _has_no_schedule(a: Namespace, s: Surroundings) -> bool:
    if not a.use_checkpoint_opt_param_scheduler or a.skip_train or not s.files_here:
        return False
    start = _start(a, s)
    if start is None or not start.goes_on:
        return not begins_where_it_saves(a)  # the same line goes on from there later
    return start.recorded is not None and start.recorded.scheduler is None


def _over_rows(a: Namespace) -> bool:
    tokens = vocabulary.num_tokens(a)
    return tokens is not None and a.padded_vocab_size is not None and tokens > a.padded_vocab_size


@dataclass(frozen=True)
class OfCheckpoint(Refusal):
    """A row whose message begins with the option that names the checkpoint, and with the checkpoint."""

    def message(self, args: Namespace, around: Surroundings) -> str:
        start = _start(args, around)
        assert start is not None
        where = start.recorded.folder.name if start.recorded is not None else ""
        named = replace(self, argument=start.option, value=f"{start.root}{where and f' ({where})'}")
        return Refusal(**{field.name: getattr(named, field.name) for field in fields(named)}).message(
            args, around
        )


ROWS = (
    Refusal(
        "load_missing",
        FEATURE,
        "--load",
        "{load}",
        _is_missing,
        "the run would begin with random weights",
        "a folder with checkpoints, or leave it out; where a first start is to find nothing, --load is the folder of "
        "--save",
        "--load nowhere",
        detail=lambda a, s: f"the folder {_state(a.load)}",
    ),
    Refusal(
        "pretrained_missing",
        FEATURE,
        "--pretrained-checkpoint",
        "{pretrained_checkpoint}",
        lambda a, s: (
            s.files_here
            and a.pretrained_checkpoint is not None
            and s.checkpoint is None
            and not has_checkpoint(a.load)
            and not has_checkpoint(a.pretrained_checkpoint)
        ),
        "there is nothing to begin with",
        "a folder with checkpoints (and latest_checkpointed_iteration.txt)",
        "--pretrained-checkpoint nowhere",
        detail=lambda a, s: f"the folder {_state(a.pretrained_checkpoint)}",
    ),
    Refusal(
        "exit_on_missing",
        FEATURE,
        "--exit-on-missing-checkpoint",
        "",
        lambda a, s: a.exit_on_missing_checkpoint and _start(a, s) is None and s.files_here,
        "there is no checkpoint in --load {load}",
        "--load with a folder of checkpoints, or leave it out",
        "--exit-on-missing-checkpoint",
    ),
    OfCheckpoint(
        "checkpoint_unreadable",
        FEATURE,
        "--load",
        "",
        lambda a, s: (start := _start(a, s)) is not None and bool(start.problem),
        "no checkpoint there can be loaded",
        "another folder or --ckpt-step",
        "--load trained",
        _imagined("no checkpoint there is complete"),
        detail=lambda a, s: (_start(a, s) or Start("", Path())).problem,
    ),
    OfCheckpoint(
        "checkpoint_of_other_model",
        FEATURE,
        "--load",
        "",
        lambda a, s: bool(_other_arguments(a, s)),
        "the checkpoint was trained with other arguments",
        "the checkpoint's values, or " + CHANGES + " NAME … where a difference is meant",
        "--load trained --moe-router-topk 2",
        _imagined(moe_router_topk=4),
        detail=_differing,
        remedy=_remedy,
    ),
    OfCheckpoint(
        "checkpoint_without_arguments",
        FEATURE,
        "--load",
        "",
        lambda a, s: (
            (start := _start(a, s)) is not None
            and start.recorded is not None
            and start.recorded.args is None
            and UNRECORDED not in _named(a)
        ),
        "the checkpoint does not say what it was trained with, so that nothing can be compared",
        f"{CHANGES} {UNRECORDED} if this run's arguments are known to be the checkpoint's",
        "--load trained",
        _imagined(),
    ),
    Refusal(
        "changes_unknown",
        FEATURE,
        CHANGES,
        "{checkpoint_changes}",
        lambda a, s: not _named(a) <= set(possible_changes()),
        "the weights of a checkpoint have one shape, and other arguments are not compared",
        f"names among {', '.join(possible_changes())}",
        f"{CHANGES} hidden_size",
    ),
    Refusal(
        "changes_without_checkpoint",
        FEATURE,
        CHANGES,
        "{checkpoint_changes}",
        lambda a, s: bool(_named(a)) and a.load is None and a.pretrained_checkpoint is None,
        "no checkpoint is loaded",
        "--load or --pretrained-checkpoint as well, or leave it out",
        f"{CHANGES} rope_type",
    ),
    Refusal(
        "model_from_nothing",
        FEATURE,
        "--model-from-checkpoint",
        "",
        lambda a, s: a.model_from_checkpoint and a.load is None and a.pretrained_checkpoint is None,
        "no checkpoint is loaded",
        "--load or --pretrained-checkpoint as well, or leave it out",
        "--model-from-checkpoint",
    ),
    Refusal(
        "other_length_goes_on",
        FEATURE,
        "--seq-length",
        "{seq_length}",
        _counts_other_tokens,
        "with --load {load} the run goes on counting samples, which were of another length",
        f"--finetune or --pretrained-checkpoint, with {CHANGES} {SEQ_LENGTH}",
        f"--load trained --seq-length 64 {CHANGES} {SEQ_LENGTH}",
        _imagined(seq_length=32),
    ),
    Refusal(
        "optimizer_of_other_layers",
        FEATURE,
        "--mtp-num-layers",
        "{mtp_num_layers}",
        _optimizer_of_other_layers,
        "with --load {load} the optimizer's state is loaded too, which belongs to other layers",
        "--no-load-optim, --finetune or --pretrained-checkpoint",
        f"--load trained --mtp-num-layers 0 {CHANGES} mtp_num_layers",
        _imagined(mtp_num_layers=1),
    ),
    OfCheckpoint(
        "other_schedule",
        FEATURE,
        "--load",
        "",
        lambda a, s: bool(_other_schedule(a, s)),
        "the checkpoint's learning-rate schedule is another one",
        "--override-opt-param-scheduler to go on with this run's, --use-checkpoint-opt-param-scheduler to keep the "
        "checkpoint's, or --finetune to begin anew",
        "--load trained --lr 5e-4",
        _imagined(scheduler={"max_lr": 1e-3}, seq_length=32),
        detail=lambda a, s: ", ".join(_other_schedule(a, s)),
    ),
    Refusal(
        "no_schedule_to_use",
        FEATURE,
        "--use-checkpoint-opt-param-scheduler",
        "",
        _has_no_schedule,
        "the run does not go on from a checkpoint with a learning-rate schedule",
        "--load with a checkpoint that has one (saved without --no-save-optim, loaded without --finetune)",
        "--use-checkpoint-opt-param-scheduler",
    ),
    Refusal(
        "two_schedules",
        FEATURE,
        "--override-opt-param-scheduler",
        "",
        lambda a, s: a.override_opt_param_scheduler and a.use_checkpoint_opt_param_scheduler,
        "--use-checkpoint-opt-param-scheduler says the opposite",
        "one of the two",
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
    ),
    Refusal(
        "tokenizer_over_rows",
        "Data",
        "--padded-vocab-size",
        "{padded_vocab_size}",
        lambda a, s: _over_rows(a),
        "the tokenizer has more tokens than that",
        "at least as many rows as tokens, or leave it out",
        "--padded-vocab-size 64 --tokenizer-type NullTokenizer",
        detail=lambda a, s: f"{vocabulary.num_tokens(a)}",
    ),
)
