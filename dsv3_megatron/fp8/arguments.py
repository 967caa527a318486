"""`--fp8-recipe dsv3`: one word for both backends; `--fp8-dispatch` with it.

Megatron parses the command line several times, not always with our options. So both words are spelled out in Megatron's
own: the name of recipe and dispatch stands in `--fp8-quantizer-factory`, which Megatron hands on and does not use. For
Transformer Engine its block scaling is named beside it, of which ours is a subclass (`fp8/patches/get_fp8_recipe.py`);
the reference backend has no FP8 of Megatron's.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.fp8.precision import DISPATCHES, FACTORIES, RECIPES, factory_of


def add_arguments(parser: ArgumentParser) -> None:
    """Let Megatron's `--fp8-recipe` take our names."""
    for action in parser._actions:
        if action.dest == "fp8_recipe":
            action.choices = [*(action.choices or ()), *RECIPES]
    parser.add_argument_group("fp8").add_argument(
        "--fp8-dispatch",
        choices=DISPATCHES,
        help="with --fp8-recipe dsv3: what tokens are sent to the experts in (default e4m3); DeepEP sends a token once "
        "per node, so that bf16 is no more bytes there than e4m3 through an all-to-all",
    )


def spell_out(argv: Sequence[str], given: Namespace) -> list[str]:
    """The command line with `--fp8-recipe ‹ours›` in Megatron's options; without one, unchanged.

    Raises:
        RefusedArgument: another of Megatron's FP8 options says something else, and would be overruled.
    """
    name = getattr(given, "fp8_recipe", None)
    if name not in RECIPES:
        return list(argv)
    factory, format_ = getattr(given, "fp8_quantizer_factory", None), getattr(given, "fp8", None)
    if factory and not factory.startswith(FACTORIES):
        raise RefusedArgument(
            f"--fp8-quantizer-factory {factory}: --fp8-recipe {name} has quantizers of its own. Use one of the two."
        )
    if format_ not in (None, "e4m3"):
        raise RefusedArgument(
            f"--fp8-format {format_}: --fp8-recipe {name} is E4M3 both ways (R§3.3.2). Use --fp8-format e4m3, or leave "
            "it out."
        )
    megatron = ["--fp8-quantizer-factory", factory_of(name, getattr(given, "fp8_dispatch", None))]
    if getattr(given, "transformer_impl", None) != "local":
        megatron = ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise", *megatron]
    return [*_without(argv, "--fp8-recipe", "--fp8-dispatch"), *megatron]


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """The words without these options and their values."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in options:
            next(words, None)
        elif word.split("=")[0] not in options:
            kept.append(word)
    return kept
