"""Input files as bytes, compressed or not, by what they begin with and not by their name."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from dsv3_megatron.data.errors import InputError

__all__ = ["HEAD", "is_compressed", "opened"]

HEAD = 1 << 16  # bytes read at a time, and that tell what a file is

_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# What people have and this cannot read: how to make text of it.
_REFUSED = {
    b"\x28\xb5\x2f\xfd": "zstandard: decompress it first (zstd -d)",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "parquet: write it as JSON Lines first (pandas: read_parquet, to_json(orient='records', lines=True))",
    b"ARROW1": "an Arrow file: write it as JSON Lines first (datasets: Dataset.to_json)",
    b"\xff\xfe\x00\x00": "UTF-32: convert it first (iconv -f UTF-32 -t UTF-8)",
    b"\x00\x00\xfe\xff": "UTF-32: convert it first (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "UTF-16: convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: convert it first (iconv -f UTF-16 -t UTF-8)",
}


def is_compressed(path: Path) -> bool:
    """Whether a byte of the file is no byte of its text."""
    return _opener(path) is not None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's text as bytes, after a UTF-8 byte order mark.

    Raises:
        InputError: it is of a kind that cannot be read, or its compressed data is cut off or damaged (also while the
            caller reads).
    """
    opener = _opener(path)
    try:
        with io.BufferedReader((opener or _plain)(path, "rb"), HEAD) as file:
            _refuse(path, file.peek(8))
            if file.peek(3).startswith(b"\xef\xbb\xbf"):
                file.read(3)
            yield cast(BinaryIO, file)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}:1: compressed data is cut off or damaged ({error})") from None
    except OSError as error:
        if opener is None:
            raise
        raise InputError(f"{path}:1: compressed data is damaged ({error})") from None


def _plain(path: Path, mode: str) -> Any:
    return open(path, mode, buffering=0)


def _opener(path: Path) -> Callable[..., Any] | None:
    with path.open("rb") as file:
        start = file.read(8)
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


def _refuse(path: Path, start: bytes) -> None:
    for magic, reason in _REFUSED.items():
        if start.startswith(magic):
            raise InputError(f"{path}:1: {reason}")
