"""The two kinds of link of an expert-parallel group: the rail across nodes, and the node itself.

A rail joins the ranks with the same index of all nodes; what it carries to others crosses InfiniBand. A node's group
carries over NVLink. All ranks make all groups, in one order, when the model is built, and use each once before the
first step: NCCL would otherwise connect in the middle of one.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "INFINIBAND",
    "NVLINK",
    "Link",
    "Links",
    "Pending",
    "connect",
    "link_bytes",
    "links_of",
    "node_blocks",
]

INFINIBAND, NVLINK = "infiniband", "nvlink"
_sent = {INFINIBAND: 0, NVLINK: 0}
_connected: dict[Any, "Links"] = {}  # of each expert-parallel group of this rank


def link_bytes() -> dict[str, int]:
    """Bytes that this process has sent to other ranks over each kind of link, since it began."""
    return dict(_sent)


class Pending(Protocol):
    """Rows on their way."""

    def wait(self) -> Tensor:
        """The rows that have come [n, w], once they are here (on a GPU: once the stream may use them)."""


class Link(Protocol):
    """One kind of link as a dispatcher uses it; tests have others that sleep."""

    def exchange(self, message: Tensor, rows_out: list[int], rows_in: list[int]) -> Pending:
        """Start to send message [rows, w] to the peers, `rows_out` to each in order, and to receive `rows_in`."""


@dataclass(frozen=True)
class Links:
    """Both links of one rank, and where it stands."""

    rail: Link
    node: Link
    num_nodes: int
    node_size: int
    rank: int


@dataclass
class _Received:
    rows: Tensor
    work: Any = None
    keep: Any = field(default=None, repr=False)  # sent rows live as long as they are read

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = None
        self.keep = None
        return self.rows


@dataclass(frozen=True)
class GroupLink:
    """A link that is a process group; `group` None: the rank has no peers, and keeps what it sends."""

    kind: str
    group: Any
    rank: int

    def exchange(self, message: Tensor, rows_out: list[int], rows_in: list[int]) -> Pending:
        """See `Link`."""
        if self.group is None:
            return _Received(message)
        _sent[self.kind] += (sum(rows_out) - rows_out[self.rank]) * message.shape[1] * message.dtype.itemsize
        message = message.contiguous()
        rows = message.new_empty(sum(rows_in), message.shape[1])
        work = dist.all_to_all_single(rows, message, rows_in, rows_out, group=self.group, async_op=True)
        return _Received(rows, work, message)


def node_blocks(ranks: list[int], node_size: int) -> list[list[int]]:
    """The ranks of an expert-parallel group by node.

    Raises:
        ValueError: they do not lie on whole nodes, or not as many on each.
    """
    blocks: dict[int, list[int]] = {}
    for rank in ranks:
        blocks.setdefault(rank // node_size, []).append(rank)
    sizes = {len(block) for block in blocks.values()}
    if len(sizes) > 1 or [rank for block in blocks.values() for rank in block] != ranks:
        raise ValueError(
            f"--moe-node-size {node_size}: the expert-parallel ranks {ranks} do not lie evenly on nodes of {node_size}"
        )
    return list(blocks.values())


def connect(ep_group: Any, node_size: int, communication_sms: int = 20) -> Links:
    """Make the links of all expert-parallel groups of the job; every rank calls this once per model, before building.

    Args:
        ep_group: this rank's.
        node_size: ranks that share a machine, by their global number.
        communication_sms: SMs of both links together on NCCL (report §3.2.2: 20), one CTA each.
    """
    if ep_group in _connected:
        return _connected[ep_group]
    mine = dist.get_process_group_ranks(ep_group)
    links: Links | None = None
    for ranks in groups_alike(mine, dist.get_world_size()):
        blocks = node_blocks(ranks, node_size)
        rails = [list(rail) for rail in zip(*blocks, strict=True)]
        groups = {
            kind: [_new_group(members, communication_sms) for members in lists]
            for kind, lists in ((INFINIBAND, rails), (NVLINK, blocks))
        }
        if ranks == mine:
            position = ranks.index(dist.get_rank())
            node, index = divmod(position, len(blocks[0]))
            links = Links(
                rail=GroupLink(INFINIBAND, groups[INFINIBAND][index], node),
                node=GroupLink(NVLINK, groups[NVLINK][node], index),
                num_nodes=len(blocks),
                node_size=len(blocks[0]),
                rank=position,
            )
    assert links is not None
    _connected[ep_group] = links
    _warm_up(links)
    return links


def links_of(ep_group: Any) -> Links:
    """What `connect` has made for this group."""
    if ep_group not in _connected:
        raise RuntimeError("dispatch.connect has not been called for this expert-parallel group")
    return _connected[ep_group]


def groups_alike(mine: list[int], world_size: int) -> list[list[int]]:
    """The ranks of every expert-parallel group of the job, the same list on all ranks: Megatron lays them beside each
    other, in blocks.

    Raises:
        ValueError: `mine` is none of them.
    """
    stride = mine[1] - mine[0] if len(mine) > 1 else 1
    block = stride * len(mine)
    groups = [
        list(range(first, first + block, stride))
        for start in range(0, world_size, block)
        for first in range(start, start + stride)
    ]
    if mine not in groups or world_size % block:
        raise ValueError(f"the expert-parallel ranks {mine} are no block of {world_size} ranks")
    return groups


def _new_group(ranks: list[int], communication_sms: int) -> Any:
    """A process group with capped CTAs on NCCL; None where a rank would be alone."""
    if len(ranks) == 1:
        return None
    options = None
    if dist.get_backend() == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = max(1, communication_sms // 2)
    return dist.new_group(ranks, pg_options=options)


def _warm_up(links: Links) -> None:
    """One row to every peer over either link: connections exist before a step needs them."""
    device = torch.cuda.current_device()
    for link, size in ((links.rail, links.num_nodes), (links.node, links.node_size)):
        row = torch.zeros(size, 1, dtype=torch.uint8, device=device)
        link.exchange(row, [1] * size, [1] * size).wait()
    for kind in _sent:
        _sent[kind] = 0
