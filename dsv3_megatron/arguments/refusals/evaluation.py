"""Evaluation during training."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation.catalog import check_names, split_names

FEATURE = "Evaluation during training"
ALONE = ("eval_tasks_interval", "eval_tasks_limit")  # mean nothing without tasks


def _unknown(a: Namespace, s: Surroundings) -> str:
    """What is wrong with the names, "" where nothing is."""
    if a.eval_tasks is None or not s.files_here:
        return ""
    try:
        check_names(split_names(a.eval_tasks))
    except RefusedArgument as error:
        return str(error).removeprefix("--tasks").lstrip(": ")
    return ""


ROWS = (
    Refusal(
        "eval_tasks_unknown",
        FEATURE,
        "--eval-tasks",
        "",
        lambda a, s: bool(_unknown(a, s)),
        "cannot be evaluated",
        "names that dsv3 evaluate knows (dsv3 evaluate --list)",
        "--eval-tasks dsv3_needel --eval-tasks-interval 5 --tokenizer-model nowhere",
        detail=_unknown,
    ),
    Refusal(
        "eval_tasks_without_interval",
        FEATURE,
        "--eval-tasks",
        "{eval_tasks}",
        lambda a, s: a.eval_tasks is not None and a.eval_tasks_interval is None,
        "nothing says how often",
        "--eval-tasks-interval STEPS as well",
        "--eval-tasks dsv3_choice_en",
    ),
    Refusal(
        "eval_tasks_interval",
        FEATURE,
        "--eval-tasks-interval / --eval-tasks-limit",
        "",
        lambda a, s: a.eval_tasks is None and any(getattr(a, name) is not None for name in ALONE),
        "nothing is evaluated",
        "--eval-tasks NAME … as well",
        "--eval-tasks-interval 5",
    ),
    Refusal(
        "eval_tasks_tokenizer",
        FEATURE,
        "--tokenizer-type",
        "{tokenizer_type}",
        lambda a, s: a.eval_tasks is not None and a.tokenizer_type != "HuggingFaceTokenizer",
        "--eval-tasks are texts",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR",
        "--eval-tasks dsv3_choice_en --eval-tasks-interval 5 --tokenizer-type NullTokenizer",
    ),
    Refusal(
        "eval_tasks_skip_train",
        FEATURE,
        "--eval-tasks",
        "{eval_tasks}",
        lambda a, s: a.eval_tasks is not None and a.skip_train,
        "--skip-train leaves no steps between which to evaluate",
        "dsv3 evaluate on a checkpoint",
        "--eval-tasks dsv3_choice_en --eval-tasks-interval 5 --skip-train",
    ),
    Refusal(
        "eval_tasks_context_parallel",
        FEATURE,
        "--context-parallel-size",
        "{context_parallel_size}",
        lambda a, s: a.eval_tasks is not None and a.context_parallel_size > 1,
        "--eval-tasks read whole sequences, which are cut here",
        "dsv3 evaluate on a checkpoint, or --context-parallel-size 1",
        "--eval-tasks dsv3_choice_en --eval-tasks-interval 5 --context-parallel-size 2",
    ),
)
