"""Checkpoints are compared with what they were trained with: every argument of the model, and nothing else."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.arguments import RefusedArgument, check, complete, megatron_parser
from dsv3_megatron.arguments.command_line import parse
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.checkpoint import model
from dsv3_megatron.checkpoint.arguments import possible_changes
from tests.arguments.lines import MICRO
from tests.checkpoint.fake import arguments, write

EIGHT = Surroundings(world_size=8)


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


@pytest.fixture
def world_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [1 - value[0], *value[1:]]
    if isinstance(value, int | float):
        return value * 2 + 1
    return "another"


def refusal(args: Namespace, around: Surroundings = EIGHT) -> str:
    try:
        check(args, around)
    except RefusedArgument as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("field", model.FIELDS, ids=lambda field: field.dest)
def test_every_argument_of_the_model_is_compared(field: model.Field, parser: Any, tmp_path: Path) -> None:
    """One field of the checkpoint is another one: the error names its option and both values, and nothing else."""
    yarn = "--rope-type yarn" if field.dest in model.OF_YARN else ""
    recorded = arguments(parser, yarn)
    before = getattr(recorded, field.dest, None)
    setattr(recorded, field.dest, {"rope_type": "yarn"}.get(field.dest, other(before)))
    args = arguments(parser, f"{yarn} --load {write(tmp_path / 'saved', recorded)}")
    text = refusal(args)
    there, here = (model._shown(field.value(a)) for a in (recorded, args))
    assert f"{field.flag} {there} (this run: {here})" in text, text
    assert text.count("(this run:") == 1 and "iter_0000004" in text and "\n" not in text
    assert (f"--checkpoint-changes {field.dest} where" in text) == (not field.shapes)
    if not field.shapes and field.dest != "mtp_num_layers":
        args.checkpoint_changes = [field.dest]
        assert refusal(args) == ""


def test_options_are_spelled_as_the_parser_does(parser: Any) -> None:
    known = {option: action.dest for action in parser._actions for option in action.option_strings}
    assert {field.flag: known.get(field.flag) for field in model.FIELDS} == {
        f.flag: f.dest for f in model.FIELDS
    }


# Fields of Megatron's model configuration that do not make the model another one, or are made of what does.
FROM_OTHERS = {
    "activation_func": "swiglu",
    "gated_linear_unit": "swiglu",
    "num_moe_experts": "num_experts",
    "num_query_groups": "group_query_attention",
    "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "is_hybrid_model": "hybrid_layer_pattern",
    "heterogeneous_block_specs": "heterogeneous_layers_config_path",
    "vocab_size": "vocabulary.py",
    "should_pad_vocab": "vocabulary.py",
    "make_vocab_size_divisible_by": "vocabulary.py",
    "moe_token_dropping": "moe_expert_capacity_factor",
    "moe_token_drop_policy": "moe_expert_capacity_factor",
}


def test_every_field_of_the_configuration_is_on_one_side(parser: Any) -> None:
    """A field that a new Megatron brings fails here until it is compared, or is said not to make another model."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsv3_megatron.arguments.options import OPTIONS
    from dsv3_megatron.specs.model_config import DSV3ModelConfig

    fields = {
        f.name for config in (MLATransformerConfig, DSV3ModelConfig) for f in dataclasses.fields(config)
    }
    left = fields - set(model.BY_DEST) - set(FROM_OTHERS)
    assert left <= set(OPTIONS.other_fields), sorted(left - set(OPTIONS.other_fields))


def test_all_differences_are_one_error(parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser))
    text = refusal(
        arguments(parser, f"--load {saved} --moe-router-topk 2 --rotary-base 500000 --hidden-size 64")
    )
    assert text.startswith(
        f"--load {saved} (iter_0000004): the checkpoint was trained with other arguments ("
    )
    assert (
        "--hidden-size 32 (this run: 64), --rotary-base 10000 (this run: 500000), --moe-router-topk 4" in text
    )
    assert "--checkpoint-changes rotary_base moe_router_topk where" in text and "\n" not in text


@pytest.mark.parametrize(
    "words",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --pipeline-schedule dualpipe "
        "--use-distributed-optimizer --global-batch-size 32 --override-opt-param-scheduler",
        "--context-parallel-size 2",
        "--bf16 --use-distributed-optimizer",
        "--fp8-recipe dsv3 --bf16",
        "--recompute-granularity selective --recompute-modules layernorm",
        "--moe-token-dispatcher-type flex",
        "--moe-aux-loss-coeff 1e-3 --allow-deviation moe_aux_loss_coeff",
        "--mtp-loss-scaling-factor 0.1 --moe-router-bias-update-rate 0",
        "--micro-batch-size 2 --global-batch-size 16 --override-opt-param-scheduler",
    ],
)
def test_layout_precision_and_training_are_free(words: str, parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser))
    words_in_full = complete_words(parser, f"{words} --load {saved}")
    queues = 32 if "dualpipe" in words else 1
    assert refusal(parse(parser, words_in_full), dataclasses.replace(EIGHT, max_connections=queues)) == ""


def complete_words(parser: Any, words: str) -> list[str]:
    from dsv3_megatron.arguments.command_line import parse_given
    from dsv3_megatron.arguments.complete import missing_words
    from dsv3_megatron.fp8.arguments import spell_out

    given = [*MICRO, "--transformer-impl", "transformer_engine", *words.split()]
    given = spell_out(given, parse_given(parser, given))
    return given + missing_words(parse_given(parser, given))


# Sequence length: samples count tokens.


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--load {}", "--seq-length 32 (this run: 64)"),
        ("--load {} --checkpoint-changes seq_length", "--seq-length 64: with --load"),
        ("--load {} --finetune", "--checkpoint-changes seq_length where"),
        ("--pretrained-checkpoint {}", "--checkpoint-changes seq_length where"),
        ("--load {} --finetune --checkpoint-changes seq_length", ""),
        ("--pretrained-checkpoint {} --checkpoint-changes seq_length", ""),
        ("--load {} --skip-train --checkpoint-changes seq_length", ""),
    ],
)
def test_sequence_length(words: str, part: str, parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser))
    text = refusal(arguments(parser, f"--seq-length 64 {words.format(saved)}"))
    assert part in text and bool(part) == bool(text)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--load {}", "--mtp-num-layers 1 (this run: none)"),
        ("--load {} --checkpoint-changes mtp_num_layers", "--mtp-num-layers (not given): with --load"),
        ("--load {} --checkpoint-changes mtp_num_layers --no-load-optim", ""),
        ("--load {} --checkpoint-changes mtp-num-layers --finetune", ""),
        ("--pretrained-checkpoint {} --checkpoint-changes mtp_num_layers", ""),
    ],
)
def test_mtp_dropped_is_said(words: str, part: str, parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser))
    text = refusal(arguments(parser, f"--mtp-num-layers 0 {words.format(saved)}"))
    assert part in text and bool(part) == bool(text)


def test_yarn_is_said_once_and_need_not_be_said_again(parser: Any, tmp_path: Path) -> None:
    """The long-context phases: `rope_type` covers YaRN's constants; the resumed phase has the checkpoint's."""
    base = write(tmp_path / "base", arguments(parser))
    long = "--rope-type yarn --seq-length 64"
    changes = "--checkpoint-changes rope_type seq_length"
    assert "--rope-type rope (this run: yarn)" in refusal(
        arguments(parser, f"{long} --pretrained-checkpoint {base}")
    )
    own = tmp_path / "own"
    run = f"{long} {changes} --pretrained-checkpoint {base} --load {own} --save {own} --save-interval 1"
    assert refusal(arguments(parser, run)) == ""
    write(tmp_path / "own", arguments(parser, long))
    assert refusal(arguments(parser, run)) == ""
    # And back is a change as well.
    assert "--rope-type yarn (this run: rope)" in refusal(
        arguments(parser, f"--finetune --load {tmp_path}/own --seq-length 64")
    )


def test_yarn_constants_do_not_count_without_yarn(parser: Any, tmp_path: Path) -> None:
    recorded = arguments(parser)
    recorded.beta_fast, recorded.original_max_position_embeddings = 16.0, 8192
    assert refusal(arguments(parser, f"--load {write(tmp_path / 'saved', recorded)}")) == ""


def test_unrecorded_arguments(parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", None)
    assert "does not say what it was trained with" in refusal(arguments(parser, f"--load {saved}"))
    assert refusal(arguments(parser, f"--load {saved} --checkpoint-changes unrecorded")) == ""


def test_a_checkpoint_of_another_megatron(parser: Any, tmp_path: Path) -> None:
    """What it does not record it had by Megatron's default; MLA's rope is YaRN unless it is named."""
    recorded = arguments(parser)
    for name in (
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "moe_router_enable_expert_bias",
    ):
        delattr(recorded, name)
    recorded.rope_type = None
    text = refusal(arguments(parser, f"--load {write(tmp_path / 'saved', recorded)}"))
    assert (
        "--moe-router-enable-expert-bias off (this run: on)" in text
        and "--rope-type yarn (this run: rope)" in text
    )
    assert text.count("(this run:") == 2


def test_what_may_be_named(parser: Any) -> None:
    assert {"rope_type", "seq_length", "mtp_num_layers", "moe_router_topk", "unrecorded"} <= set(
        possible_changes()
    )
    assert "hidden_size" not in possible_changes()
    args = arguments(
        parser, "--checkpoint-changes hidden_size --load nowhere --save nowhere --save-interval 1"
    )
    assert "--checkpoint-changes ['hidden_size']: the weights" in refusal(args)


# Converted checkpoints give the model.


def converted(folder: Path, **values: Any) -> Path:
    recorded = Namespace(
        num_layers=3,
        moe_layer_freq=[0, 1, 1],
        hidden_size=48,
        q_lora_rank=None,
        rotary_base=50000,
        layernorm_epsilon=1e-5,
        moe_router_topk=2,
        moe_router_num_groups=1,
        moe_router_group_topk=1,
        moe_router_topk_scaling_factor=2.446,
        mtp_num_layers=None,
        vocab_size=96,
        padded_vocab_size=96,
        max_position_embeddings=8192,
        rope_type="yarn",
        rotary_scaling_factor=32.0,
        mscale=0.7,
        mscale_all_dim=0.7,
        original_max_position_embeddings=2048,
        beta_fast=16,
        beta_slow=1,
        model_from_checkpoint=True,
    )
    vars(recorded).update(values)
    return write(folder, recorded, 0, release=True)


LOCAL = ["--transformer-impl", "local", "--mock-data", "--train-iters", "3", "--global-batch-size", "8"]


def test_a_converted_checkpoint_gives_sizes_and_rope(
    parser: Any, tmp_path: Path, world_of_8: None, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = converted(tmp_path / "saved")
    args = parse(parser, complete([*LOCAL, "--load", str(saved)], parser))
    recorded = dict(vars(converted_args(saved)))
    assert recorded.pop("model_from_checkpoint") is args.model_from_checkpoint
    assert {name: getattr(args, name) for name in recorded} == recorded
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("> from --load")]
    assert len(told) == 1 and "--rotary-base 50000" in told[0] and "--rope-type yarn" in told[0]
    assert args.kv_lora_rank == 512  # not recorded: the published model's


def converted_args(saved: Path) -> Namespace:
    from dsv3_megatron.checkpoint.start import start_of

    start = start_of(Namespace(load=str(saved)))
    assert start is not None and start.recorded is not None and start.recorded.args is not None
    return start.recorded.args


def test_what_is_given_wins_and_is_compared(parser: Any, tmp_path: Path, world_of_8: None) -> None:
    saved = converted(tmp_path / "saved")
    with pytest.raises(RefusedArgument, match=r"--rotary-base 50000 \(this run: 10000\)\)"):
        complete([*LOCAL, "--load", str(saved), "--rotary-base", "10000"], parser)
    with pytest.raises(
        RefusedArgument, match=r"--rope-type yarn \(this run: rope\)\)\. Use .*changes rope_type"
    ):
        complete([*LOCAL, "--load", str(saved), "--rope-type", "rope"], parser)
    words = [*LOCAL, "--load", str(saved), "--rope-type", "rope", "--checkpoint-changes", "rope_type"]
    args = parse(parser, complete(words, parser))
    assert (args.rope_type, args.rotary_scaling_factor, args.mscale) == ("rope", 1.0, 1.0)


def test_runs_that_began_with_a_conversion_go_on_alike(parser: Any, tmp_path: Path, world_of_8: None) -> None:
    """The second start loads what the first one saved, by the same command line."""
    saved, own = converted(tmp_path / "saved"), tmp_path / "own"
    line = [
        *LOCAL,
        "--pretrained-checkpoint",
        str(saved),
        "--load",
        str(own),
        "--save",
        str(own),
        "--save-interval",
        "1",
    ]
    first = parse(parser, complete(line, parser))
    write(own, first)
    second = parse(parser, complete(line, parser))
    ignored = {"model_from_checkpoint"}
    assert {k: v for k, v in vars(second).items() if k not in ignored} == {
        k: v for k, v in vars(first).items() if k not in ignored
    }


def test_a_trained_checkpoint_gives_its_model_when_asked(
    parser: Any, tmp_path: Path, world_of_8: None
) -> None:
    saved = write(tmp_path / "saved", arguments(parser))
    # Not asked: the 671B model is another one, and all of its sizes are in the error.
    with pytest.raises(RefusedArgument) as refused:
        complete([*LOCAL, "--load", str(saved)], parser)
    assert "--hidden-size 32 (this run: 7168)" in str(refused.value) and "--model-from-checkpoint" in str(
        refused.value
    )
    words = [*LOCAL, "--load", str(saved), "--model-from-checkpoint", "--lr", "1e-3", "--seq-length", "32"]
    assert parse(parser, complete(words, parser)).hidden_size == 32
