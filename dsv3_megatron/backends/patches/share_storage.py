"""`random._get_share_storage`: recomputed outputs on CPU need no compiler.

After recomputing, Megatron lets the freed output tensor point at the new values through a C++ extension that
it compiles on first use. On CPU the values are copied into the output's storage instead; on GPU nothing changes.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def _get_share_storage() -> Callable[[Tensor, Tensor], None]:
        def share_storage(freed: Tensor, recomputed: Tensor) -> None:
            if freed.device.type != "cpu":
                original()(freed, recomputed)
                return
            source = recomputed.untyped_storage()
            freed.untyped_storage().resize_(source.nbytes())
            freed.untyped_storage().copy_(source)

        return share_storage

    return _get_share_storage


PATCH = Patch(
    name="share_storage",
    target="megatron.core.tensor_parallel.random:_get_share_storage",
    signature="()",
    why="recompute on CPU copies its output instead of compiling a C++ extension",
    install=_install,
)
