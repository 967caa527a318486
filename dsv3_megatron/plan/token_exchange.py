"""Dispatch and combine of one layer: which copies cross which links, and how long they take, by dispatcher.

DeepEP and HybridEP send a token once to each NVLink domain and forward it inside (R§3.2.2). NCCL's all-to-all
(Megatron's `alltoall`) sends a copy for each expert, to where the expert is, and its copies are made and sorted in
memory before and after (`permutations`). `two_hop` sends a token once to each domain over NCCL, and forwards it in a
second one. Megatron's `allgather` sends every token to every rank, by collectives.
"""

from math import log2
from typing import NamedTuple

from dsv3_megatron.plan.destinations import destinations
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job

# GPUs that share NVLink in one machine, for which DeepEP was written.
_NARROW = 8


class Copies(NamedTuple):
    """Copies of a token that leave a rank: over InfiniBand, and over NVLink."""

    ib: float
    nvlink: float


def nvlink_domain(job: Job, gpu: Gpu) -> int:
    """GPUs that share NVLink: as the job says (`--nvlink-domain-size`), else as the hardware table does."""
    return job.nvlink_domain or gpu.nvlink_domain


def copies(job: Job, domain: int, back: bool = False) -> Copies:
    """On the way to the experts, or (`back`) of their outputs."""
    to, layout = destinations(job, domain), job.layout
    if job.dispatcher == "alltoall":
        return Copies(to.experts_outside, to.experts_inside)
    if job.dispatcher == "allgather":  # a ring through each rank's own link, whose messages all ranks see
        return Copies(to.num_domains - 1, layout.expert_ranks - 1)
    # A token enters a domain through the rank with its own rank's index; what is for that one stays there.
    other_index = 1 - to.num_domains / layout.expert_ranks
    hit = to.ranks * layout.ep / (layout.ep - 1) if layout.ep > 1 else 1.0
    rows = hit * layout.etp  # all who share an expert
    if job.dispatcher == "two_hop" and back:
        rows = job.sizes.moe_router_topk  # a row per expert, so that sums have one order
    return Copies(to.domains, rows * other_index)


def seconds(job: Job, gpu: Gpu, bytes_per_element: float, beside: bool = False, back: bool = False) -> float:
    """Dispatch of one layer, or (`back`) combine; `beside`: while computation runs on the other SMs."""
    a = gpu.achieved
    if job.layout.expert_ranks == 1:
        return 0
    tokens = (
        job.tokens
        / job.layout.tp
        * (job.load_imbalance if job.capacity_factor is None else job.capacity_factor)
    )
    size = bytes_per_element * job.sizes.hidden_size * tokens
    over = copies(job, nvlink_domain(job, gpu), back)
    ib, nvlink = (
        copies_ * size / (link * share)
        for copies_, link, share in zip(
            over, (gpu.ib, gpu.nvlink), _shares(job, gpu, beside, back), strict=True
        )
    )
    deepep = job.dispatcher in ("flex", "two_hop")
    latency = tokens * a.beside_token if beside and over.ib and deepep else a.latency
    # two_hop: the first piece's first hop and the last one's second have nothing beside them.
    edges = a.latency + min(ib, nvlink) / job.dispatch_chunks if job.dispatcher == "two_hop" else 0
    return latency + max(ib, nvlink) + edges + _shared(job, gpu, size)


def _shared(job: Job, gpu: Gpu, size: float) -> float:
    """Seconds in which ranks that share experts gather each other's rows, or sum their parts of the outputs: Megatron's
    all-to-all goes to one of them (DeepEP and HybridEP send to each)."""
    layout, a = job.layout, gpu.achieved
    if layout.etp == 1 or job.dispatcher != "alltoall":
        return 0
    inside = layout.etp <= nvlink_domain(job, gpu)
    rate = gpu.nvlink * a.nvlink if inside else gpu.ib * a.ib
    return a.latency + size * job.sizes.moe_router_topk * (layout.etp - 1) / rate


def _shares(job: Job, gpu: Gpu, beside: bool, back: bool) -> tuple[float, float]:
    """Fractions of InfiniBand and NVLink that the dispatcher reaches."""
    a = gpu.achieved
    wide = min(nvlink_domain(job, gpu), job.layout.expert_ranks) > _NARROW
    if job.dispatcher in ("alltoall", "two_hop"):
        alone = a.nccl_ib if job.dispatcher == "two_hop" else _all_to_all_of(job, gpu)
        return min(alone, a.beside_ib) if beside else alone, a.nccl_nvlink
    if job.dispatcher == "allgather":
        return a.ib, a.nvlink
    ib = a.beside_ib if beside else a.ib
    if job.dispatcher == "flex" and job.flex_backend == "hybridep":
        return ib, a.hybridep_nvlink
    return ib, a.deepep_wide[back] if wide and job.dispatcher == "flex" else a.nvlink


def _all_to_all_of(job: Job, gpu: Gpu) -> float:
    """Share of InfiniBand that one all-to-all reaches between so many domains: with every doubling the same step, from
    two of them to eight; `two_hop` talks to ranks of its own index only, each on its own rail."""
    a, domains = gpu.achieved, destinations(job, nvlink_domain(job, gpu)).num_domains
    steps = min(2.0, max(0.0, log2(domains) - 1))
    return a.nccl_ib * (a.nccl_many / a.nccl_ib) ** (steps / 2)


def permutations(job: Job) -> float:
    """Bytes read and written in one direction of a layer (dispatch and combine) to order copies, beyond what the
    experts' own operators read and write.

    NCCL's all-to-all: rows are copied for each expert, sent, and sorted by expert; the same back. DeepEP writes its
    rows by rank, and a copy for each expert follows; HybridEP does that while it receives. In FP8 a copy into rows
    padded to its tiles follows, and one back, unless router or dispatcher have padded.
    """
    if job.layout.expert_ranks == 1 or job.software.own_kernels:
        return 0
    copies = job.sizes.moe_router_topk * job.layout.etp
    row = job.tokens / job.layout.tp * job.sizes.hidden_size * job.precision.compute
    if job.dispatcher in ("alltoall", "two_hop"):
        moved = 1 + job.sizes.moe_router_topk + (2 * copies if job.local_experts > 1 else 0)
    else:
        moved = 0 if job.flex_backend == "hybridep" and job.dispatcher == "flex" else copies
    return row * 2 * (moved + (2 * copies if job.experts_pad else 0))
