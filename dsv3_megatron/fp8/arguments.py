"""`--fp8-recipe dsv3`: one word for both backends.

Megatron parses the command line several times, not always with our options. So the word is spelled out in Megatron's
own: for Transformer Engine as a custom recipe whose quantizers are ours; for the reference backend, which knows no FP8
of Megatron's, as the name of these quantizers alone.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3_megatron.fp8.precision import FACTORIES, RECIPES


def add_arguments(parser: ArgumentParser) -> None:
    """Let Megatron's `--fp8-recipe` take our names."""
    for action in parser._actions:
        if action.dest == "fp8_recipe":
            action.choices = [*(action.choices or ()), *RECIPES]


def spell_out(argv: Sequence[str], given: Namespace) -> list[str]:
    """The command line with `--fp8-recipe ‹ours›` in Megatron's options; without one, unchanged."""
    words = list(argv)
    name = getattr(given, "fp8_recipe", None)
    if name not in RECIPES:
        return words
    at = max(i for i, word in enumerate(words) if word.split("=")[0] == "--fp8-recipe")
    width = 1 if "=" in words[at] else 2
    megatron = ["--fp8-quantizer-factory", FACTORIES + name]
    if getattr(given, "transformer_impl", None) != "local":
        megatron = ["--fp8-format", "e4m3", "--fp8-recipe", "custom", *megatron]
    return [*words[:at], *megatron, *words[at + width :]]
