"""Bytes over each kind of link per step, logged with the metrics (docs/metrics.md)."""

from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.dispatch.links import INFINIBAND, NVLINK, link_bytes

__all__ = ["begin_step", "end_step", "figures"]

_KINDS = (INFINIBAND, NVLINK)
_start = dict.fromkeys(_KINDS, 0)
_sum = dict.fromkeys(_KINDS, 0)
_steps = 0


def begin_step(call: dict[str, Any]) -> None:
    """What is sent from here on belongs to a step (evaluation between two steps does not)."""
    _start.update(link_bytes())


def end_step(call: dict[str, Any], result: Any) -> None:
    """The end of the step."""
    global _steps
    _steps += 1
    for kind, sent in link_bytes().items():
        _sum[kind] += sent - _start[kind]


def figures(record: dict[str, Any]) -> dict[str, float]:
    """Bytes per step of the whole job since this was last asked; every rank must ask."""
    global _steps
    total = torch.tensor(
        [_sum[kind] for kind in _KINDS], dtype=torch.int64, device=torch.cuda.current_device()
    )
    dist.all_reduce(total)
    steps = max(1, _steps)
    _steps = 0
    for kind in _KINDS:
        _sum[kind] = 0
    return {f"dispatch_{kind}_bytes": sent / steps for kind, sent in zip(_KINDS, total.tolist(), strict=True)}
