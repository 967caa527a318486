"""What our tasks are made for: the harness makes their documents without knowing the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_megatron.evaluation.grading import Grader, by_match

__all__ = ["Setting", "current", "use"]


@dataclass(frozen=True)
class Setting:
    """Of an evaluation.

    Attributes:
        max_length: tokens of the model's context.
        count: tokens of a text.
        texts: files whose text `dsv3_text` measures.
        needle_lengths: tokens of the haystacks; by default powers of two up to the context.
        needle_depths: where the needle is, in percent of the haystack.
        grader: of answers to questions of fact.
    """

    max_length: int = 1024
    count: Callable[[str], int] = field(default=lambda text: len(text.split()))
    texts: tuple[Path, ...] = ()
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    grader: Grader = by_match


_current = Setting()


def use(setting: Setting) -> None:
    """Make documents for this from now on."""
    global _current
    _current = setting


def current() -> Setting:
    """What documents are made for."""
    return _current
