"""FP8 dispatch through DeepEP, which takes a pair (E4M3, scales) where Megatron only ever passes bf16.

Megatron asks for DeepEP's buffer whenever it sends (`fused_a2a.get_buffer`). For the groups named here it gets the one
below: tokens on their way to the experts, and the gradients of their outputs, travel in E4M3; combine, both ways, stays
in bf16 (report §3.3.3).
"""

import weakref
from typing import Any

from torch import Tensor

from dsv3_megatron.fp8.arithmetic import arithmetic_for
from dsv3_megatron.patching import install

__all__ = ["FP8Buffer", "send_fp8_in", "sends_fp8"]

_groups: "weakref.WeakSet[Any]" = weakref.WeakSet()


def send_fp8_in(group: Any) -> None:
    """From now on DeepEP dispatches in FP8 within this group of ranks."""
    install(["deepep_buffer"])
    _groups.add(group)


def sends_fp8(group: Any) -> bool:
    """Whether `send_fp8_in` named this group."""
    return group in _groups


class FP8Buffer:
    """DeepEP's `Buffer` whose `dispatch` takes and returns bf16 and sends E4M3; all else is the buffer's own."""

    def __init__(self, buffer: Any):
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        **rest: Any,
    ) -> tuple[Any, ...]:
        """As DeepEP's for x [n, h]; with a handle, Megatron sends a gradient along the way of the tokens before it.

        `previous_event` lies before the quantisation here, which the communication stream must wait for: so another
        takes its place. The layout that it also stood for was computed on that very stream.
        """
        arithmetic = arithmetic_for(x)
        message = arithmetic.quantize_tile(x, eps=1e-4 if handle is None else 0.0, pow2=True)
        if async_finish:
            previous_event = _event_now()
        received, *others, event = self._buffer.dispatch(
            message, handle=handle, previous_event=previous_event, async_finish=async_finish, **rest
        )
        if async_finish:
            event.current_stream_wait()
        return arithmetic.dequantize(*received, x.dtype), *others, event


def _event_now() -> Any:
    """DeepEP's event of what the current stream has been given so far."""
    from megatron.core.transformer.moe import fused_a2a

    return fused_a2a.EventOverlap(fused_a2a.EventHandle())
