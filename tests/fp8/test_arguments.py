"""`--fp8-recipe dsv3` on its way to the model: our trainer, Hydra, a patched pretrain_gpt.py."""

import sys
from argparse import ArgumentParser, Namespace

import pytest

from dsv3_megatron.arguments import RefusedArgument, check, complete, megatron_parser
from dsv3_megatron.arguments.command_line import parse, parse_given
from dsv3_megatron.arguments.complete import missing_words
from dsv3_megatron.arguments.entry import complete_command_line
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.fp8.arguments import spell_out
from dsv3_megatron.fp8.precision import FACTORIES, RECIPES, recipe_of
from tests.arguments.lines import MICRO

LOCAL = ["--transformer-impl", "local", "--bf16"]


def bare_parser() -> ArgumentParser:
    """Megatron's, without our options."""
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


@pytest.mark.parametrize("given", [["--fp8-recipe", "dsv3"], ["--fp8-recipe=dsv3"]])
def test_reference_backend(given: list[str]) -> None:
    """Megatron sees no FP8 of its own, and the configuration still names the recipe."""
    args = parse(megatron_parser(), complete([*MICRO, *LOCAL, *given]))
    assert recipe_of(args) is RECIPES["dsv3"]
    assert args.fp8 is None and args.fp8_recipe == "delayed"


def test_words_that_megatron_knows() -> None:
    """Megatron parses the command line again without our options."""
    words = complete([*MICRO, *LOCAL, "--fp8-recipe", "dsv3_per_tensor"])
    plain, _ = bare_parser().parse_known_args(words)
    assert recipe_of(plain) is RECIPES["dsv3_per_tensor"]


def test_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["dsv3_megatron.arguments.complete"]  # the package has a function of that name
    monkeypatch.setattr(
        module, "check", lambda args, around: None
    )  # TE is not installed here, and there is no GPU
    words = complete([*MICRO, "--transformer-impl", "transformer_engine", "--bf16", "--fp8-recipe", "dsv3"])
    args = parse(megatron_parser(), words)
    assert (args.fp8, args.fp8_recipe) == ("e4m3", "blockwise")
    assert args.fp8_quantizer_factory == FACTORIES + "dsv3" and recipe_of(args) is RECIPES["dsv3"]


def test_other_recipes_are_left_alone() -> None:
    words = [*MICRO, *LOCAL]
    assert recipe_of(parse(megatron_parser(), complete(words))) is None


def test_patched_pretrain_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point that a patched Megatron-LM calls before it parses."""
    monkeypatch.setattr(
        sys, "argv", ["pretrain_gpt.py", "--spec", "dsv3", *MICRO, *LOCAL, "--fp8-recipe", "dsv3"]
    )
    parser = bare_parser()
    complete_command_line(parser)
    assert recipe_of(parser.parse_known_args()[0]) is RECIPES["dsv3"]


def test_hydra() -> None:
    from dsv3_megatron.conf import compose, to_argv

    words = to_argv(compose(["model=micro", "layout=cpu_single", "precision=fp8_dsv3", "device=cpu"]))
    at = words.index("--fp8-recipe")
    assert words[at + 1] == "dsv3" and "--bf16" in words


def test_an_unknown_recipe_names_ours() -> None:
    with pytest.raises(RefusedArgument, match=r"--fp8-recipe.*deepseek.*dsv3"):
        complete([*MICRO, *LOCAL, "--fp8-recipe", "deepseek"])


@pytest.mark.parametrize("given", [["--fp8-dispatch", "bf16"], ["--fp8-dispatch=bf16"], []])
def test_dispatch_reaches_a_megatron_without_our_options(given: list[str]) -> None:
    words = complete([*MICRO, *LOCAL, "--fp8-recipe", "dsv3", *given])
    plain, unknown = bare_parser().parse_known_args(words)
    recipe = recipe_of(plain)
    assert recipe is not None and recipe.name == "dsv3"
    assert recipe.dispatch == ("bf16" if given else "e4m3")
    assert not any(word.startswith("--fp8-dispatch") for word in words + unknown)


@pytest.mark.parametrize(
    "given, message",
    [
        ("--fp8-quantizer-factory my.own", r"my\.own: --fp8-recipe dsv3 has quantizers of its own\. Use one"),
        ("--fp8-format hybrid", r"--fp8-format hybrid: --fp8-recipe dsv3 is E4M3 both ways"),
    ],
)
def test_nothing_given_is_overruled(given: str, message: str) -> None:
    for words in ([*given.split(), "--fp8-recipe", "dsv3"], ["--fp8-recipe", "dsv3", *given.split()]):
        with pytest.raises(RefusedArgument, match=message):
            complete([*MICRO, "--bf16", "--transformer-impl", "transformer_engine", *words])


class TestFlex:
    """Through Megatron's flex dispatcher 20 SMs communicate (report §3.2.2)."""

    FLEX = ["--moe-token-dispatcher-type", "flex", "--hidden-size", "128"]

    def completed(self, *given: str, backend: str = "deepep", te_lacks: str = "") -> Namespace:
        words = [*MICRO, *LOCAL, *self.FLEX, "--moe-flex-dispatcher-backend", backend, *given]
        parser = megatron_parser()
        words = spell_out(words, parse_given(parser, words))
        args = parse(parser, words + missing_words(parse_given(parser, words)))
        check(args, Surroundings(world_size=8, has_deepep=True, te_lacks=te_lacks))
        return args

    @pytest.mark.parametrize("backend", ["deepep", "hybridep"])
    def test_bf16_dispatch_when_asked(self, backend: str) -> None:
        args = self.completed("--fp8-recipe", "dsv3", "--fp8-dispatch", "bf16", backend=backend)
        recipe = recipe_of(args)
        assert recipe is not None and recipe.dispatch == "bf16" and args.moe_flex_dispatcher_num_sms == 20

    def test_e4m3_through_deepep_only(self) -> None:
        recipe = recipe_of(self.completed("--fp8-recipe", "dsv3"))
        assert recipe is not None and recipe.dispatch == "e4m3"
        with pytest.raises(RefusedArgument, match=r"hybridep: Megatron 0.19 .*Use --fp8-dispatch bf16"):
            self.completed("--fp8-recipe", "dsv3", backend="hybridep")
