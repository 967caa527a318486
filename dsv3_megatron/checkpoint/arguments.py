"""`--checkpoint-changes` and `--model-from-checkpoint`: the options, and what this run takes from a checkpoint."""

from argparse import ArgumentParser, Namespace
from typing import Any

from dsv3_megatron.checkpoint.model import BY_DEST, FIELDS, OF_YARN, changeable
from dsv3_megatron.checkpoint.start import Start, start_of

SEQ_LENGTH = "seq_length"
UNRECORDED = "unrecorded"
# Sizes that are not the model's, but a release's tables and limits.
_ALSO_TAKEN = ("padded_vocab_size", "vocab_size", "max_position_embeddings")
_SPELLINGS = {"norm_epsilon": "layernorm_epsilon"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add our options to Megatron's parser."""
    group = parser.add_argument_group("dsv3 checkpoints")
    group.add_argument(
        "--checkpoint-changes",
        nargs="+",
        default=[],
        type=name_of,
        metavar="NAME",
        help="arguments that are meant to differ from those that the loaded checkpoint was trained with, e.g. "
        f"`rope_type seq_length` for a longer context, `mtp_num_layers` to drop or add MTP; `{UNRECORDED}` loads a "
        "checkpoint that does not say what it was trained with",
    )
    group.add_argument(
        "--model-from-checkpoint",
        action="store_true",
        help="sizes, positions and routing that are not given are the loaded checkpoint's, not the 671B model's (on by "
        "itself where the checkpoint comes from `dsv3 convert`)",
    )


def name_of(text: str) -> str:
    """`--norm-epsilon`, `norm-epsilon` and `layernorm_epsilon` are one name."""
    name = text.lstrip("-").replace("-", "_")
    return _SPELLINGS.get(name, name)


def possible_changes() -> list[str]:
    """What `--checkpoint-changes` may name."""
    return [*changeable(), SEQ_LENGTH, UNRECORDED]


def taken(given: Namespace) -> tuple[Start | None, dict[str, Any]]:
    """The checkpoint that this run takes its model from, with the values of what was not given.

    Args:
        given: only what the command line gives.
    """
    start = start_of(given)
    if start is None or start.recorded is None or start.recorded.args is None:
        return start, {}
    if not (start.recorded.gives_the_model or getattr(given, "model_from_checkpoint", False)):
        return start, {}
    recorded = start.recorded.args
    names = [field.dest for field in FIELDS] + list(_ALSO_TAKEN)
    values = {
        name: getattr(recorded, name)
        for name in names
        if hasattr(recorded, name) and not hasattr(given, name)
    }
    if getattr(given, "rope_type", None) not in (None, BY_DEST["rope_type"].value(recorded)):
        for name in OF_YARN:  # another rope type has its own
            values.pop(name, None)
    if getattr(given, "seq_length", 0) > values.get("max_position_embeddings", 0):
        values.pop("max_position_embeddings", None)
    if hasattr(given, "tokenizer_type") and given.tokenizer_type != "NullTokenizer":
        values.pop("vocab_size", None)  # such a tokenizer brings its own
    if not hasattr(given, "model_from_checkpoint"):
        values["model_from_checkpoint"] = True
    return start, values
