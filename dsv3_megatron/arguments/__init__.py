"""The command line of a DeepSeek-V3 run: what is not given is filled in, what cannot be is refused."""

from dsv3_megatron.arguments.command_line import add_arguments, megatron_parser
from dsv3_megatron.arguments.complete import complete
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.refusals import REFUSALS, check
from dsv3_megatron.arguments.settings import SETTINGS

__all__ = [
    "REFUSALS",
    "SETTINGS",
    "RefusedArgument",
    "add_arguments",
    "check",
    "complete",
    "megatron_parser",
]
