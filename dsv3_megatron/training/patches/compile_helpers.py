"""`megatron.core.datasets.utils.compile_helpers`: the compiled helper that ships is used as it is.

Rank 0 of every start runs `make` in `core/datasets` and exits with status 1 when that fails. The wheel ships the compiled
`helpers_cpp` and no Makefile.
"""

import functools
import importlib
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def compile_helpers() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            original()

    return compile_helpers


PATCH = Patch(
    name="compile_helpers",
    target="megatron.core.datasets.utils:compile_helpers",
    signature="()",
    why="a start ends with status 1: `make` in a wheel without Makefile, though the compiled helper ships",
    install=_install,
)
