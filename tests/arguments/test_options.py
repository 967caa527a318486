"""Every option of Megatron's parser has a fate in the table, and the command line does what the table says."""

import ast
import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.arguments import RefusedArgument, complete, megatron_parser
from dsv3_megatron.arguments.command_line import parse, parse_given
from dsv3_megatron.arguments.options import FATES, OPTIONS, every_dest, notes, refusals
from dsv3_megatron.arguments.settings import BY_DEST
from dsv3_megatron.arguments.surroundings import Surroundings
from tests.arguments.lines import MICRO

REPOSITORY = Path(__file__).parents[2]
EIGHT = Surroundings(world_size=8)


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


@pytest.fixture(scope="module")
def megatrons() -> Any:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def test_no_option_is_left_out_and_none_is_made_up(megatrons: Any) -> None:
    """An option that a new Megatron brings has to be put somewhere; one that it no longer has goes."""
    assert every_dest(megatrons) == set(OPTIONS.by_name)
    assert sum(len(group.names) for group in OPTIONS.groups) == len(OPTIONS.by_name)


def test_our_own_options_are_not_in_it(parser: Any, megatrons: Any) -> None:
    assert not (every_dest(parser) - every_dest(megatrons)) & set(OPTIONS.by_name)


def test_rows_say_what_they_have_to() -> None:
    for group in OPTIONS.groups:
        assert group.fate in FATES, group.title
        if group.fate == "honoured":
            assert group.how and group.shown and not group.why, group.title
            if group.shown != "Megatron's own":
                assert (REPOSITORY / group.shown).is_file(), group.shown
        elif group.fate == "idle":
            assert group.why and not group.use, group.title
        else:
            assert bool(group.why) == bool(group.use), group.title


def test_the_settings_are_honoured() -> None:
    """What is filled in has an effect."""
    assert {
        name for name in BY_DEST if name in OPTIONS.by_name and OPTIONS.by_name[name].fate != "honoured"
    } == {"sft"}


def words_of(action: Any) -> list[str]:
    """Words that give an argument another value than its default."""
    option = action.option_strings[0]
    if action.nargs == 0:
        return [option]
    if action.choices is not None:
        other = [c for c in action.choices if c != action.default and [c] != action.default]
        return [option, getattr(other[0], "name", str(other[0]))]
    count = action.nargs if isinstance(action.nargs, int) else 1
    if action.type in (int, float):
        value = (action.default if isinstance(action.default, int | float) else 1) + 1
        return [option, *[str(action.type(value))] * count]
    if action.dest == "linear_attention_freq":
        return [option, "2"]
    if action.type is not None and action.type.__name__ in ("moe_freq_type", "no_rope_freq_type"):
        return [option, "[0]*1+[1]*3" if "moe" in action.type.__name__ else "4"]
    if action.type is not None and "cuda_graph_modules" in action.type.__name__:
        return [option, "attn"]
    if action.type is not None and action.type.__name__ == "tuple_type":
        return [option, "3,4"]
    return [option, "nowhere"]


def actions_of(fate: str) -> list[Any]:
    parser = megatron_parser()
    return [
        action
        for action in parser._actions
        if action.dest in OPTIONS.by_name and OPTIONS.by_name[action.dest].fate == fate
    ]


def refused(words: list[str], parser: Any) -> str:
    """The error of a line, "" where there is none."""
    try:
        complete(words, parser, around=EIGHT)
    except RefusedArgument as error:
        return str(error)
    return ""


def test_refused_options_are_errors(parser: Any) -> None:
    """By the table, by a row of the refusals or by a setting: the error names the option."""
    unnamed = []
    for action in actions_of("refused"):
        line = [word for word in MICRO if word != "--mock-data" or action.dest != "sft"]
        if action.dest == "encoder_seq_length":
            line = line[: line.index("--seq-length")] + line[line.index("--seq-length") + 2 :]
        if action.option_strings == ["--yarn-correction-range-round-to-int"]:
            continue  # says what is so anyway
        message = refused([*line, *words_of(action)], parser)
        if not any(option in message for option in action.option_strings):
            unnamed.append((action.option_strings[0], message))
    assert unnamed == []


def test_idle_options_are_said(parser: Any) -> None:
    for action in actions_of("idle"):
        words = [*MICRO, *words_of(action)]
        given, args = parse_given(parser, words), parse(parser, words)
        lines = [line for line in notes(given, args, parser, EIGHT) if action.option_strings[0] in line]
        assert len(lines) == 1 and "has no meaning here" in lines[0], action.option_strings
        assert refusals(given, parser) == []


NEEDY = [a for a in actions_of("honoured") if OPTIONS.by_name[a.dest].needs]


def test_options_without_what_they_need_are_said(parser: Any) -> None:
    for action in NEEDY:
        needs = OPTIONS.by_name[action.dest].needs
        unmet = {
            "pipeline_schedule=1f1b": ["--pipeline-schedule", "zb1p"],
            "transformer_impl=transformer_engine": ["--transformer-impl", "local"],
        }.get(needs, [])
        words = [*MICRO, *unmet, *words_of(action)]
        given, args = parse_given(parser, words), parse(parser, words)
        start = f"> {action.option_strings[0]}"
        said = [line for line in notes(given, args, parser, EIGHT) if line.startswith(start)]
        assert len(said) == 1 and "without --" in said[0], (start, said)


def test_what_is_needed_exists(parser: Any) -> None:
    from dsv3_megatron.arguments.options import _conditions, _is_met

    known = every_dest(parser)
    for group in OPTIONS.groups:
        for name, sign, value in _conditions(group.needs) if group.needs else ():
            assert name in known
            met = {"": True, "=": value, "!=": value + "x"}[sign]
            assert _is_met(group.needs, Namespace(**{name: met}))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--no-fp8-wgrad", "--no-fp8-wgrad: Megatron reads it for delayed scaling only"),
        ("--embedding-init-method-std 0.1", "--embedding-init-method-std 0.1: initial weights"),
        ("--freeze-all-layers", "--freeze-all-layers: is read by"),
        ("--inprocess-restart", "--inprocess-restart: wraps"),
    ],
)
def test_found_by_reading_the_code(words: str, part: str, parser: Any) -> None:
    assert part in refused(["--transformer-impl", "local", *MICRO, *words.split()], parser)


def test_nothing_is_said_of_what_the_runtime_gives(parser: Any) -> None:
    from dsv3_megatron.cpu import CPU_FLAGS

    words = [*CPU_FLAGS, *MICRO]
    given, args = parse_given(parser, words), parse(parser, words)
    assert notes(given, args, parser, Surroundings(on_cpu=True)) == []


def test_a_vocabulary_that_a_tokenizer_brings(parser: Any) -> None:
    words = [*MICRO, "--tokenizer-type", "HuggingFaceTokenizer"]
    given, args = parse_given(parser, words), parse(parser, words)
    assert any(
        line.startswith("> --vocab-size 128 has no meaning here")
        for line in notes(given, args, parser, EIGHT)
    )


# Numbers.


def numbers(parser: Any) -> list[Any]:
    return [
        a
        for a in parser._actions
        if a.option_strings
        and a.dest in OPTIONS.by_name
        and OPTIONS.by_name[a.dest].fate == "honoured"
        and (a.type in (int, float) or a.dest in ("mtp_num_layers", "q_lora_rank"))
        and a.choices is None
    ]


def test_lists_of_numbers_name_numbers(parser: Any) -> None:
    known = {a.dest for a in parser._actions if a.type in (int, float)} | {"mtp_num_layers", "q_lora_rank"}
    for names in OPTIONS.numbers.values():
        assert set(names) <= known, set(names) - known


def test_impossible_numbers_are_refused(parser: Any) -> None:
    for action in numbers(parser):
        if action.dest in OPTIONS.numbers["any"] or isinstance(action.nargs, int):
            continue
        option = action.option_strings[0]
        for value in ["-3", *(["nan", "inf"] if action.type is float else [])]:
            messages = refusals(parse_given(parser, [f"{option}={value}"]), parser)
            start = f"{option} {float(value) if action.type is float else value}: "
            assert any(message.startswith(start) for message in messages), (start, messages)


def test_defaults_are_possible(parser: Any) -> None:
    """The rule does not refuse what Megatron has by itself, but for "none of it"."""
    from dsv3_megatron.arguments.options import _violated

    for action in numbers(parser):
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert _violated(action, action.default) == "" or action.default in (0, -1), action.dest


# The table is true of the code: an option that is honoured is read.


@functools.cache
def sources() -> dict[str, set[str]]:
    """Names that occur in code (not in strings or comments), by package: Megatron's, and ours."""
    import megatron.core

    root = Path(megatron.core.__file__).parents[1]
    skipped = ("training/arguments.py", "training/yaml_arguments.py", "training/config/")
    found: dict[str, set[str]] = {"megatron": set(), "ours": set()}
    for package, folder in (("megatron", root), ("ours", REPOSITORY / "dsv3_megatron")):
        for file in folder.rglob("*.py"):
            name = file.relative_to(folder).as_posix()
            if name.startswith(skipped) or ("arguments/" in name and package == "ours"):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute):
                    found[package].add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found[package].add(node.value)
                elif isinstance(node, ast.keyword) and node.arg:
                    found[package].add(node.arg)
    return found


# Honoured by Megatron's parsing and validation alone, which the search leaves out.
IN_VALIDATION = {
    "accumulate_allreduce_grads_in_fp32", "account_for_embedding_in_pipeline_split", "disable_msc_deprecated",
    "external_cuda_graph", "grad_reduce_in_bf16", "moe_deepep_num_sms", "moe_hybridep_num_sms", "moe_enable_deepep",
    "moe_router_padding_for_fp8", "no_weight_decay_cond_type", "num_virtual_stages_per_pipeline_rank",
    "recompute_activations", "cuda_graph_scope_deprecated", "spec", "mock_data",
}  # fmt: skip


def test_honoured_options_are_read_somewhere() -> None:
    names = sources()
    read = names["megatron"] | names["ours"]
    unread = {name for name, g in OPTIONS.by_name.items() if g.fate == "honoured" and name not in read}
    assert unread <= IN_VALIDATION, sorted(unread - IN_VALIDATION)


def test_options_that_nothing_reads_are_not() -> None:
    group = next(g for g in OPTIONS.groups if g.title == "Options that Megatron has and nothing reads")
    read = {name for name in group.names if name in sources()["megatron"]}
    assert read <= {"vocab_extra_ids", "dist_ckpt_save_pre_mcore_014", "moe_upcycling_granularity"}, read


def test_help_can_be_printed(parser: Any) -> None:
    """All refusals of the parser point to --help; a help text of Megatron's holds a bare percent sign."""
    assert "(e.g. 1.10 = 10%)" in " ".join(parser.format_help().split())
