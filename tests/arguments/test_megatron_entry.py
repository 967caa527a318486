"""What a patched and an unpatched Megatron-LM call: the entry point, and the check on importing our specs."""

import argparse
import sys
from importlib.metadata import entry_points

import pytest
from megatron.training.arguments import add_megatron_arguments

from dsv3_megatron.arguments import RefusedArgument, complete
from dsv3_megatron.arguments.complete import FULL_SPEC
from dsv3_megatron.arguments.entry import complete_command_line
from dsv3_megatron.arguments.unpatched import check_command_line
from tests.arguments.lines import MICRO

LOCAL = ["--transformer-impl", "local"]


@pytest.fixture
def parser():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def run(monkeypatch, parser, words):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
    complete_command_line(parser)
    return sys.argv[1:]


def test_the_entry_point_is_declared():
    declared = {point.name: point.load() for point in entry_points(group="megatron.plugins")}
    assert declared == {"dsv3": complete_command_line}


@pytest.mark.parametrize("spec", [["--spec", "dsv3"], ["--spec=dsv3"]])
def test_one_word_is_completed(monkeypatch, parser, spec):
    words = run(monkeypatch, parser, [*LOCAL, *MICRO, *spec])
    assert words == complete([*LOCAL, *MICRO, *spec])
    assert parser.parse_args(words).spec == FULL_SPEC
    # Megatron may parse twice (in-process restart): nothing more to do then.
    again = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert run(monkeypatch, again, words) == words


@pytest.mark.parametrize(
    "words", [[], ["--spec", "local"], ["--spec", "other.module", "dsv3"], ["--num-layers", "2"]]
)
def test_other_command_lines_are_left_alone(monkeypatch, parser, words):
    assert run(monkeypatch, parser, words) == words


def test_a_contradiction_ends_the_process(monkeypatch, parser, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, parser, [*LOCAL, *MICRO, "--spec", "dsv3", "--normalization", "LayerNorm"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --normalization LayerNorm contradicts DeepSeek-V3")


def two_words(*words):
    return ["--spec", *FULL_SPEC, *LOCAL, *MICRO, *words]


@pytest.mark.parametrize("words", ["--on-bad-step skip", "--loss-spike-factor 2.0"])
def test_what_only_our_trainer_does(monkeypatch, parser, capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, parser, ["--spec", "dsv3", *LOCAL, *MICRO, *words.split()])
    assert ended.value.code == 2
    assert f"error: {words}: pretrain_gpt.py" in capsys.readouterr().err


def test_unpatched_complete_line_is_accepted():
    check_command_line(complete(two_words()))


def test_unpatched_missing_words_make_the_line_complete():
    with pytest.raises(RefusedArgument) as refused:
        check_command_line(two_words())
    missing = str(refused.value).splitlines()[-1].split()
    assert "--multi-latent-attention" in missing and "--num-layers" not in missing
    check_command_line(two_words(*missing))


@pytest.mark.parametrize(
    ("words", "message"),
    [("--adam-beta2 0.9", "--adam-beta2 0.9 contradicts"), ("--fp16", "--fp16: ")],
)
def test_unpatched_wrong_line_is_refused(words, message):
    with pytest.raises(RefusedArgument, match=message):
        check_command_line([*complete(two_words()), *words.split()])
