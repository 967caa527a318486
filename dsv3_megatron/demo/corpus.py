"""The demo's corpus: source text of the Python standard library on this machine."""

import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np

from dsv3_megatron.data.encode import EncodeSettings, token_dtype
from dsv3_megatron.data.prepare import REPORT_FILE, PrepareSettings, prepare

# Not the library's own text, its tests, and tables of generated data.
EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
MAX_FILE_BYTES = 200_000


def standard_library_files(max_bytes: int, folder: Path | None = None) -> list[Path]:
    """Sorted source files of about `max_bytes` in all: the same ones wherever the library is the same.

    Files are taken in the order of a digest of their name, so that a part of the library is a mixture of it.
    Left out: folders above, files that are not UTF-8, and files over 200 kB.

    Errors: FileNotFoundError if the library's source is not installed beside this Python.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    names = [
        path.relative_to(folder)
        for path in folder.rglob("*.py")
        if not EXCLUDED_FOLDERS.intersection(path.relative_to(folder).parts[:-1])
    ]
    chosen, total = [], 0
    for name in sorted(names, key=lambda name: hashlib.blake2b(name.as_posix().encode()).digest()):
        data = (folder / name).read_bytes()
        if not 0 < len(data) <= MAX_FILE_BYTES or not _is_utf8(data):
            continue
        if total + len(data) > max_bytes:
            break
        chosen.append(folder / name)
        total += len(data)
    if not chosen:
        raise FileNotFoundError(f"no source files of the Python standard library in {folder}")
    return sorted(chosen)


def prepare_corpus(folder: Path, max_bytes: int, vocab_size: int, valid_fraction: float) -> None:
    """Prepare the standard library into `folder`, once: a finished folder is left alone."""
    settings = PrepareSettings(
        vocab_size=vocab_size,
        encode=EncodeSettings(valid_fraction=valid_fraction, split_rate=0.0),
        shard_bytes=1 << 20,
    )
    prepare(standard_library_files(max_bytes), folder, settings)


def read_tokens(folder: Path, split: str) -> np.ndarray:
    """Token ids of all documents of a split (`train`, `valid`) of a prepared folder, in order: [num
    tokens]."""
    return np.memmap(folder / f"{split}.bin", dtype=token_dtype(vocab_size_of(folder)), mode="r")


def vocab_size_of(folder: Path) -> int:
    """Number of entries of the tokenizer in a prepared folder."""
    return json.loads((folder / REPORT_FILE).read_text())["vocab_size"]


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
