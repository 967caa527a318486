"""Values of settings that follow from other arguments; `NOT_SET` where none applies."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from dsv3_megatron.arguments.setting import NOT_SET
from dsv3_megatron.posttrain import arguments as posttrain_arguments
from dsv3_megatron.recipe.arguments import MEGATRON_ARGUMENTS, default_min_lr, schedules_of
from dsv3_megatron.recipe.schedules import BATCH_SIZE
from dsv3_megatron.sft import arguments as sft_arguments


def same_as(dest: str, default: Any) -> Callable[[Namespace], Any]:
    return lambda args: getattr(args, dest, default)


def moe_layers(args: Namespace) -> str:
    """The first three layers are dense (R§4.2)."""
    num_layers = getattr(args, "num_layers", 61)
    return f"[0]*{min(3, num_layers)}+[1]*{max(0, num_layers - 3)}"


def vocab_size(args: Namespace) -> Any:
    """A real tokenizer brings its own vocabulary size."""
    named = getattr(args, "tokenizer_type", "NullTokenizer")
    return 129280 if named == "NullTokenizer" and not hasattr(args, "padded_vocab_size") else NOT_SET


def from_rows(
    value: Callable[[Namespace, dict[str, Any]], Any], otherwise: Any = NOT_SET
) -> Callable[[Namespace], Any]:
    """What the folder of `--sft-data` or `--preference-data` says; `otherwise` without one."""

    def found(args: Namespace) -> Any:
        report = sft_arguments.report_of(args) or posttrain_arguments.report_of(args)
        return otherwise if report is None else value(args, report)

    return found


def rows_folder(args: Namespace, report: dict[str, Any]) -> str:
    given: str | None = getattr(args, "sft_data", None)
    return given or args.preference_data


def row_iters(args: Namespace, report: dict[str, Any]) -> Any:
    return sft_arguments.train_iters(args) or posttrain_arguments.train_iters(args) or NOT_SET


def is_posttraining(args: Namespace) -> bool:
    return getattr(args, "posttrain", None) is not None


def sft(args: Namespace) -> Any:
    """Packed samples: those of a folder, or rollouts."""
    return True if is_posttraining(args) else from_rows(lambda args, report: True)(args)


def tokenizer_type(args: Namespace) -> Any:
    return "NullTokenizer" if getattr(args, "mock_data", False) else "HuggingFaceTokenizer"


def under_yarn(dest: str, default: float) -> Callable[[Namespace], float]:
    """Free under YaRN, where the family's models differ.

    MLA multiplies its softmax scale by mscale² whatever the rope type, so 1.0 before the long context.
    """

    def value(args: Namespace) -> float:
        return getattr(args, dest, default) if getattr(args, "rope_type", "rope") == "yarn" else 1.0

    return value


def is_softmax(args: Namespace) -> bool:
    """`--moe-router-pre-softmax` asks for V2-Lite's gate: softmax over all experts, no groups, no bias."""
    scores = getattr(args, "moe_router_score_function", "softmax")  # beside "sigmoid" a row refuses it
    return bool(getattr(args, "moe_router_pre_softmax", False)) and scores == "softmax"


def with_gate(sigmoid: Any, softmax: Any) -> Callable[[Namespace], Any]:
    return lambda args: softmax if is_softmax(args) else sigmoid


def rope_fusion(args: Namespace) -> Any:
    return NOT_SET if getattr(args, "rope_type", "rope") == "yarn" else False


def min_lr(args: Namespace) -> Any:
    """2.2e-5 belongs to the published peak; the schedules by tokens take a tenth of any."""
    if getattr(args, "train_tokens", None) is not None and hasattr(args, "lr"):
        return default_min_lr(args.lr)
    return NOT_SET if hasattr(args, "lr") else 2.2e-5


def batch_size(args: Namespace) -> Any:
    return NOT_SET if getattr(args, "train_tokens", None) is None else BATCH_SIZE


def by_tokens(name: str) -> Callable[[Namespace], Any]:
    """What `--train-tokens` makes of one of Megatron's arguments."""

    def value(args: Namespace) -> Any:
        schedules = schedules_of(args)
        return NOT_SET if schedules is None else MEGATRON_ARGUMENTS[name](schedules)

    return value


def grouped_gemm(args: Namespace) -> Any:
    """Transformer Engine's grouped GEMM; the reference backend has none."""
    return NOT_SET if getattr(args, "transformer_impl", "") == "local" else True


def communication_sms(args: Namespace) -> Any:
    """Of DeepEP's kernels; the all-to-all of NCCL chooses by itself, and two_hop takes --communication-sms.

    Megatron still takes former names.
    """
    former = hasattr(args, "moe_deepep_num_sms") or hasattr(args, "moe_hybridep_num_sms")
    if getattr(args, "moe_token_dispatcher_type", "") != "flex" or former:
        return NOT_SET
    return getattr(args, "communication_sms", 20)


def cp_comm_type(args: Namespace) -> Any:
    """The reference backend gathers keys and values; Transformer Engine can also pass them around."""
    gathers = (
        getattr(args, "transformer_impl", "") == "local" and getattr(args, "context_parallel_size", 1) > 1
    )
    return "all_gather" if gathers else NOT_SET


def bf16_moments(value: Any) -> Callable[[Namespace], Any]:
    """Megatron stores moments in bf16 only in its distributed optimizer; an fp32 run keeps fp32."""
    wanted = ("bf16", "use_distributed_optimizer")
    return lambda args: value if all(getattr(args, name, False) for name in wanted) else NOT_SET


def optimizer_checkpoint(args: Namespace) -> Any:
    """Megatron's local checkpoints, which only the same layout reads again, refuse the option."""
    local = getattr(args, "non_persistent_ckpt_type", None) == "local"
    return True if getattr(args, "use_distributed_optimizer", False) and not local else NOT_SET
