"""Files that are whole or not there: a reader, or a run that goes on, never meets half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends, in one step and over what is there.

    After an error `path` is as it was; the unfinished file (its name with ".part" behind) is written over next time.
    """
    unfinished = path.with_name(path.name + ".part")
    yield unfinished
    os.replace(unfinished, path)


def write_whole(path: Path, text: str) -> None:
    """`path.write_text(text)` in UTF-8, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
