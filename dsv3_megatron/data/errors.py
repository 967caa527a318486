"""What is wrong with input files: the message begins with `file:line`, or names the option."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input; the message begins with `file:line`."""
