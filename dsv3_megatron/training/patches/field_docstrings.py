"""`ArgumentGroupFactory._get_field_docstrings`: the help texts of a class of arguments are read once per process.

Megatron reads them from its own sources, which it parses again for every parser that it builds; a start builds several.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    read: dict[type, dict[str, str]] = {}

    @functools.wraps(original)
    def _get_field_docstrings(self: Any, src_cfg_class: type) -> dict[str, str]:
        if src_cfg_class not in read:
            read[src_cfg_class] = original(self, src_cfg_class)
        return dict(read[src_cfg_class])

    return _get_field_docstrings


PATCH = Patch(
    name="field_docstrings",
    target="megatron.training.argument_utils:ArgumentGroupFactory._get_field_docstrings",
    signature="(self, src_cfg_class)",
    why="parses Megatron's own sources again for the help texts of every parser; a start builds several",
    install=_install,
)
