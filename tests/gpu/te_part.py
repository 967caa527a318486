"""Transformer Engine's part of the bundle: its library with the code of sm_90 alone, its extension's source.

The library's wheel holds machine code for every architecture (190 MB for 2.12). What is not for sm_90 is zeroed, which
the loader never reads on a Hopper, and the wheel is compressed again with LZMA, which pip reads. The torch
extension is built on the machine, from its source, where nvcc is.
"""

import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = 90
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes behind it
_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes behind it
_ARCHITECTURE_AT = 28  # in an entry's header


class Entry(NamedTuple):
    """Code of one architecture in a fat binary: where its bytes are."""

    architecture: int
    start: int
    end: int


def entries(library: bytes | bytearray) -> Iterator[Entry]:
    """All code in the fat binaries of a library."""
    at = 0
    magic = struct.pack("<I", _MAGIC)
    while (at := library.find(magic, at)) >= 0:
        _, _, head, size = _CONTAINER.unpack_from(library, at)
        inside, end = at + head, at + head + size
        if head != _CONTAINER.size or end > len(library):
            at += 4  # the same four bytes by chance
            continue
        while inside + _ARCHITECTURE_AT + 4 <= end:
            _, _, entry_head, payload = _ENTRY.unpack_from(library, inside)
            if entry_head < _ARCHITECTURE_AT + 4 or inside + entry_head + payload > end:
                break
            (architecture,) = struct.unpack_from("<I", library, inside + _ARCHITECTURE_AT)
            yield Entry(architecture, inside + entry_head, inside + entry_head + payload)
            inside += entry_head + payload
        at = end


def keep(library: bytes, architecture: int = ARCHITECTURE) -> bytes:
    """The library with the code of all other architectures zeroed; its size and its headers stay."""
    changed = bytearray(library)
    for entry in list(entries(library)):
        if entry.architecture != architecture:
            changed[entry.start : entry.end] = bytes(entry.end - entry.start)
    return bytes(changed)


VERSION = "2.12.0"  # the newest that resolves against CUDA 13.0: later ones import a cuBLASLt symbol that it may lack
LIBRARY = f"transformer_engine_cu13=={VERSION}"
PURE = f"transformer_engine=={VERSION}"
EXTENSION = f"transformer_engine_torch=={VERSION}"
# What its Python imports beside torch, and what builds the extension; the machine may have them.
OTHERS = (
    "einops",
    "onnxscript",
    "onnx",
    "onnx-ir",
    "ml-dtypes",
    "pydantic",
    "pydantic-core",
    "annotated-types",
)
BUILDERS = ("pybind11", "ninja", "typing-inspection", "importlib-metadata", "zipp", "nvdlfw-inspect")


def build(out: Path) -> None:
    """Write gpu_bundle_te/: wheels, and the extension's source. Downloads 190 MB.

    Raises:
        SystemExit: the part would be larger than one may be.
    """
    from tests.gpu.bundle import PLATFORMS, TARGET, check_size

    (out / "wheels").mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    for spec in (PURE, *OTHERS, *BUILDERS):
        print(spec, flush=True)
        subprocess.run(
            [*pip, "--only-binary=:all:", *TARGET, *platforms, "-d", str(out / "wheels"), spec],
            check=True,
        )
    print(EXTENSION, flush=True)
    subprocess.run(
        [*pip, "--no-binary=:all:", "--no-build-isolation", "-d", str(out), EXTENSION],
        check=True,
        env={**os.environ, "NVTE_FRAMEWORK": "pytorch"},
    )
    print(f"{LIBRARY}, its code for sm_{ARCHITECTURE} alone", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "--only-binary=:all:", *platforms, "-d", scratch, LIBRARY], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        shrink(wheel, out / "wheels" / wheel.name)
    print(
        f"{out}: {check_size(out) / 1e6:.1f} MB. There: bash gpu_bundle/run.sh te, then stage 4", flush=True
    )


def shrink(wheel: Path, target: Path) -> None:
    """The wheel with `keep` applied to its libraries, compressed with LZMA, which pip reads too."""
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as out:
        for info in given.infolist():
            data = given.read(info)
            out.writestr(
                info.filename, keep(data) if ".so" in Path(info.filename).name else data, zipfile.ZIP_LZMA
            )
