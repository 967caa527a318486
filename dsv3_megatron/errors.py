"""The errors of this package, and how they reach a terminal."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn


class RefusedArgument(ValueError):
    """An argument, or a combination, that is wrong or unsupported.

    The text names the argument, the value that was given and what to use; it is raised before any process
    group, model or dataset exists.
    """


class ConfigError(RefusedArgument):
    """A configuration that cannot run; the message names the option, its value and what to use."""


class Parser(argparse.ArgumentParser):
    """A command's parser whose errors are one line, as all of ours; the usage is what --help shows."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (all options: --help)\n")


def ends_in_one_line(
    report: Callable[[Exception], str],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`exits_cleanly`, for a `main` in which other exceptions happen too: these become one line and exit status 1.

    Args:
        report: makes the line of an exception, "" where another rank tells it; keeps the traceback in a file.
    """

    def decorate(main: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(main)
        def command(*args: Any, **kwargs: Any) -> Any:
            try:
                return exits_cleanly(main)(*args, **kwargs)
            except Exception as error:
                line = report(error)
                if line:
                    print(line, file=sys.stderr, flush=True)
                raise SystemExit(1) from None

        return command

    return decorate


def told(error: BaseException) -> str:
    """What an error says; of an assertion without a text, its line."""
    if str(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line if frames else "") or repr(error)


def exits_cleanly(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a `RefusedArgument` of a command's `main` into one message (on rank 0) and exit status 2."""

    @wraps(main)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except RefusedArgument as error:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None

    return command
