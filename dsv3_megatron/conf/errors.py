"""The error of a wrong configuration, and the nearest valid name in its message."""

from collections.abc import Iterable
from difflib import get_close_matches

from dsv3_megatron.errors import ConfigError

__all__ = ["ConfigError", "nearest"]


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, or a full stop when none is close."""
    match = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."
