"""Versions, data, and ways of running that would go around the checks."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import SUPPORTED_MEGATRON, Surroundings


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _unsupported(text: str) -> bool:
    lowest, above = (_version(bound) for bound in SUPPORTED_MEGATRON)
    return not lowest <= _version(text) < above


def _has_data(a: Namespace) -> bool:
    sources = (a.data_path, a.data_args_path, a.per_split_data_args_path)
    splits = (a.train_data_path, a.valid_data_path, a.test_data_path)
    given = (a.sft_data, a.posttrain, *sources, *splits)
    return a.mock_data or any(source is not None for source in given)


ROWS = (
    Refusal(
        "megatron_version",
        "Versions",
        "megatron-core",
        "{megatron_version}",
        lambda a, s: _unsupported(s.megatron_version),
        "was not tested; its internals differ between versions",
        "pip install 'megatron-core[training]>=0.19,<0.20'",
        "",
        Surroundings(world_size=8, megatron_version="0.18.2"),
    ),
    Refusal(
        "no_data",
        "Data",
        "--data-path",
        "",
        lambda a, s: not _has_data(a),
        "no data was given, and Megatron would silently train on made-up tokens",
        "--data-path, --train-data-path and --valid-data-path, or --mock-data",
        "",
        without="--mock-data",
    ),
    Refusal(
        "no_tokenizer",
        "Data",
        "--tokenizer-model",
        "",
        lambda a, s: a.tokenizer_type == "HuggingFaceTokenizer" and a.tokenizer_model is None,
        "no tokenizer was given for the data",
        "--tokenizer-model DIR, as written by python -m dsv3_megatron.data.prepare",
        "--data-path corpus",
        without="--mock-data",
    ),
    Refusal(
        "fim_while_reading",
        "Data",
        "--fim-data",
        "",
        lambda a, s: a.fim_data,
        "fill-in-the-middle is applied to whole documents before packing (R§4.1), which a dataset of packed "
        "samples cannot do",
        "python -m dsv3_megatron.data.prepare, which does it",
        "--fim-data",
    ),
    Refusal(
        "arguments_from_checkpoint",
        "Checkpoints",
        "--use-checkpoint-args",
        "",
        lambda a, s: a.use_checkpoint_args,
        "arguments read from a checkpoint would replace the checked ones",
        "the same command line as the run that saved it",
        "--use-checkpoint-args",
    ),
    Refusal(
        "no_initialization",
        "Model",
        "--no-initialization",
        "",
        lambda a, s: not a.perform_initialization and a.load is None and a.pretrained_checkpoint is None,
        "the weights would be whatever the memory holds",
        "it beside --load or --pretrained-checkpoint only",
        "--no-initialization",
    ),
    Refusal(
        "async_save",
        "Checkpoints",
        "--async-save",
        "",
        lambda a, s: a.async_save and not a.use_persistent_ckpt_worker,
        "Megatron would save synchronously with only a warning",
        "--use-persistent-ckpt-worker as well",
        "--async-save",
    ),
    Refusal(
        "yaml_arguments",
        "Command line",
        "--yaml-cfg",
        "{yaml_cfg}",
        lambda a, s: a.yaml_cfg is not None,
        "arguments read from YAML would replace the checked ones",
        "the command line, or python -m dsv3_megatron.train_hydra",
        "--yaml-cfg run.yaml",
    ),
    Refusal(
        "rl_step",
        "Command line",
        "--perform-rl-step",
        "",
        lambda a, s: a.perform_rl_step,
        "Megatron's own reinforcement-learning loop builds another model",
        "no such option",
        "--perform-rl-step",
    ),
)
