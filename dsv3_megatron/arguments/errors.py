"""The error of a wrong command line (`dsv3_megatron.errors`, where no import leads back here)."""

from dsv3_megatron.errors import RefusedArgument, exits_cleanly

__all__ = ["RefusedArgument", "exits_cleanly"]
