"""Every row of the refusal table: its example is refused with its message, the base line is not.

Row 12 of the known failures: nothing unsupported is replaced by something else with only a warning.
"""

import pytest

from dsv3_megatron.arguments import REFUSALS, RefusedArgument, check, megatron_parser
from dsv3_megatron.arguments.command_line import parse, parse_given
from dsv3_megatron.arguments.complete import missing_words
from dsv3_megatron.arguments.surroundings import Surroundings
from tests.arguments.lines import MICRO


@pytest.fixture(scope="module")
def parser():
    return megatron_parser()


def completed(parser, words):
    return parse(parser, words + missing_words(parse_given(parser, words)))


def test_names_are_unique():
    assert len({row.name for row in REFUSALS}) == len(REFUSALS)


@pytest.mark.parametrize("words", ["", "--transformer-impl local", "--bf16 --expert-model-parallel-size 4"])
def test_a_valid_line_is_accepted(parser, words):
    check(completed(parser, MICRO + words.split()), Surroundings(world_size=8))


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_row_refuses_its_example(parser, row):
    words = [word for word in MICRO if word not in row.without.split()] + row.example.split()
    args = completed(parser, words)
    with pytest.raises(RefusedArgument) as refused:
        check(args, row.where)
    text = str(refused.value)
    assert row.message(args, row.where) in text.splitlines()
    # The message names the argument and says what to use.
    assert text.count("Use ") >= 1 and row.argument in text


@pytest.mark.parametrize("row", [row for row in REFUSALS if row.example], ids=lambda row: row.name)
def test_row_needs_its_example(parser, row):
    """Without the example's words the same machine accepts the line: the words are what is refused."""
    around = row.where
    base = ["--transformer-impl", "local"] if around.on_cpu or not around.has_te else []
    check(completed(parser, MICRO + base), around)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--moe-layer-freq", "0"], "--moe-layer-freq 0: makes every layer dense"),
        (["--pipeline-model-parallel-layout", ""], "--pipeline-model-parallel-layout: does not place"),
    ],
)
def test_values_that_megatron_divides_by_or_looks_into(parser, words, name):
    with pytest.raises(RefusedArgument, match=name):
        check(completed(parser, [*MICRO, *words]), Surroundings(world_size=8))


def test_all_problems_are_told_at_once(parser):
    args = completed(parser, [*MICRO, "--fp16", "--reset-position-ids"])
    with pytest.raises(RefusedArgument, match=r"(?s)--reset-position-ids.*--fp16"):
        check(args, Surroundings(world_size=8))
