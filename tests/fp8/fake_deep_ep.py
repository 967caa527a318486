"""DeepEP without its kernels: the module `deep_ep` as Megatron uses it, over torch.distributed.

Signatures, argument names and defaults are those of DeepEP 1.2.1 (`deep_ep/buffer.py`; 2.1.0's `buffers/legacy.py` has
the same), and so are the types that it demands: bf16, or E4M3 with fp32 scales per 128 numbers, hidden sizes that 128
divides. What a real kernel would do with wrong ones is undefined; here it is an assertion.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sent: list[str] = []  # what was dispatched, in order: "e4m3 forward", "bf16 backward", …


class EventHandle:
    def current_stream_wait(self) -> None:
        """There are no streams here."""


class EventOverlap:
    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor] | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event.current_stream_wait()


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    num_sms = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm: Any = None,
    ) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.rank, self.group_size = group.rank(), group.size()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        experts = torch.zeros(topk_idx.size(0), num_experts, dtype=torch.bool)
        experts.scatter_(1, topk_idx.clamp_min(0), topk_idx >= 0)
        in_rank = experts.view(-1, self.group_size, num_experts // self.group_size).any(2)
        per_rank, per_expert = (x.sum(0, dtype=torch.int32) for x in (in_rank, experts))
        return per_rank, None, per_expert, in_rank, EventOverlap(EventHandle())

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        parts = x if isinstance(x, tuple) else (x,)
        _check(parts)
        sent.append(
            f"{'e4m3' if isinstance(x, tuple) else 'bf16'} {'forward' if handle is None else 'backward'}"
        )
        event = EventOverlap(EventHandle() if async_finish else None)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            received = tuple(self._send(part, handle) for part in parts)
            return received if isinstance(x, tuple) else received[0], None, None, None, None, event
        assert num_tokens_per_rank is not None and is_token_in_rank is not None
        assert topk_idx is not None and topk_weights is not None and num_tokens_per_expert is not None
        assert topk_weights.dtype == torch.float32 and topk_idx.dtype == torch.int64
        rows = [is_token_in_rank[:, rank].nonzero().flatten() for rank in range(self.group_size)]
        counts = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(counts, num_tokens_per_rank.contiguous(), group=self.group)
        handle = (parts[0].size(0), rows, counts.tolist())
        received = tuple(self._send(part, handle) for part in parts)
        local = num_tokens_per_expert.numel() // self.group_size
        indices, weights = [], []
        for rank, chosen in enumerate(rows):  # experts by their numbers on the rank that gets them
            mine = topk_idx[chosen] - rank * local
            elsewhere = (mine < 0) | (mine >= local) | (topk_idx[chosen] < 0)
            indices.append(mine.masked_fill(elsewhere, -1))
            weights.append(topk_weights[chosen].masked_fill(elsewhere, 0))
        recv_idx, recv_weights = (self._exchange(torch.cat(t), handle) for t in (indices, weights))
        per_expert = [int((recv_idx == expert).sum()) for expert in range(local)]
        return (
            received if isinstance(x, tuple) else received[0],
            recv_idx,
            recv_weights,
            per_expert,
            handle,
            event,
        )

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        _check((x,))
        summed = [None if t is None else self._return(t, handle) for t in (x, topk_weights)]
        assert summed[0] is not None
        return summed[0], summed[1], EventOverlap(EventHandle() if async_finish else None)

    def _send(self, x: Tensor, handle: tuple) -> Tensor:
        return self._exchange(x[torch.cat(handle[1])], handle)

    def _exchange(self, rows: Tensor, handle: tuple, back: bool = False) -> Tensor:
        """Rows to the ranks of the handle, or from them, as bytes."""
        to, from_ = [len(chosen) for chosen in handle[1]], handle[2]
        if back:
            to, from_ = from_, to
        row_bytes = rows.contiguous().view(torch.uint8)
        received = row_bytes.new_empty(sum(from_), row_bytes.size(1))
        dist.all_to_all_single(received, row_bytes, from_, to, group=self.group)
        return received.view(rows.dtype)

    def _return(self, x: Tensor, handle: tuple) -> Tensor:
        """Sums of what comes back for each token, in fp32."""
        returned = self._exchange(x, handle, back=True).float()
        total = returned.new_zeros(handle[0], x.size(1)).index_add_(0, torch.cat(handle[1]), returned)
        return total.to(x.dtype)


def _check(parts: tuple[Tensor, ...]) -> None:
    assert all(part.is_contiguous() for part in parts)
    if len(parts) == 1:
        assert parts[0].dtype == torch.bfloat16
        return
    (rows, hidden), scale = parts[0].shape, parts[1]
    assert parts[0].dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert hidden % 128 == 0 and scale.shape == (rows, hidden // 128)


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Megatron as if DeepEP were installed; afterwards as before. Yields its `fused_a2a`."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    names = ("fused_dispatch", "fused_combine", "set_deepep_num_sms")
    fake, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    fake.Buffer = Buffer  # type: ignore[attr-defined]
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap  # type: ignore[attr-defined]
    modules = {"deep_ep": fake, "deep_ep.utils": utils}
    before = {name: getattr(token_dispatcher, name) for name in names}
    sent.clear()
    try:
        sys.modules.update(modules)
        importlib.reload(fused_a2a)
        assert fused_a2a.HAVE_DEEP_EP
        for name in names:
            setattr(token_dispatcher, name, getattr(fused_a2a, name))
        yield fused_a2a
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        importlib.reload(fused_a2a)
        for name, value in before.items():
            setattr(token_dispatcher, name, value)
