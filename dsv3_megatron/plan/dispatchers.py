"""The three dispatchers side by side: bytes over each kind of link, seconds, and where each wins.

dsv3 dispatchers model=v3_671b layout=pp16_ep64 cluster=h800_2048
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, PlanError
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.options import parse
from dsv3_megatron.plan.token_exchange import copies, nvlink_domain

USAGE = """usage: dsv3 dispatchers [output=table|json] [NAME=VALUE ...]

alltoall, flex (DeepEP) and two_hop for one MoE layer and microbatch, forward and backward: bytes that a rank sends over
InfiniBand and NVLink, seconds alone and beside computation, and which is fastest for expert-parallel sizes up to the
number of experts. NAME=VALUE: as in dsv3 plan."""

DISPATCHERS = ("alltoall", "flex", "two_hop")


@dataclass(frozen=True)
class Figures:
    """One dispatcher in one layer and microbatch, forward and backward.

    Attributes:
        infiniband, nvlink: bytes that a rank sends.
        seconds, beside: alone, and beside computation.
    """

    infiniband: float
    nvlink: float
    seconds: float
    beside: float


def figures(job: Job, gpu: Gpu, dispatcher: str) -> Figures:
    """Of a job with this dispatcher in place of its own; without weights and indices, which are a hundredth."""
    job = replace(job, dispatcher=dispatcher)
    ops = Operators(job, gpu)
    size = job.sizes.hidden_size * job.tokens / job.layout.tp * job.load_imbalance
    to_experts = ops._dispatch_bytes
    there, back = copies(job, nvlink_domain(job, gpu)), copies(job, nvlink_domain(job, gpu), back=True)
    links = [2 * size * (to_experts * a + 2.0 * b) for a, b in zip(there, back, strict=True)]
    times = []
    for beside in (False, True):
        layer = ops.moe_layer(beside)
        times.append(layer.dispatch + layer.combine + layer.dispatch_b + layer.combine_b)
    return Figures(links[0], links[1], times[0], times[1])


def winners(job: Job, gpu: Gpu) -> list[tuple[int, dict[str, Figures]]]:
    """Figures of all three for every expert-parallel size that divides the experts, on whole nodes."""
    sizes = [1 << k for k in range(1, 12) if job.sizes.num_moe_experts % (1 << k) == 0]
    domain = nvlink_domain(job, gpu)
    whole = [ep for ep in sizes if ep <= domain or ep % domain == 0]
    rows = []
    for ep in whole:
        if job.layout.num_gpus % (job.layout.pp * ep) == 0:
            on = replace(job, layout=replace(job.layout, ep=ep))
            rows.append((ep, {name: figures(on, gpu, name) for name in DISPATCHERS}))
    return rows


def dispatch_line(job: Job, gpu: Gpu) -> str:
    """The job's own dispatcher in a line: what tokens are sent in, how often, and what it comes to."""
    found = figures(job, gpu, job.dispatcher)
    sent = "E4M3" if job.precision.fp8_dispatch else "BF16" if job.precision.compute == 2 else "FP32"
    copies_per = {"alltoall": "expert", "allgather": "rank"}.get(job.dispatcher, "node")
    return (
        f"{job.dispatcher}, {sent}, one copy per {copies_per}: {found.infiniband / 1e6:.0f} MB over InfiniBand, "
        f"{found.nvlink / 1e6:.0f} MB over NVLink, {found.seconds * 1e3:.1f} ms per layer and microbatch"
    )


def table(job: Job, gpu: Gpu) -> str:
    """The job's layout, then where each wins."""
    layout = job.layout
    lines = [
        f"A MoE layer, {job.tokens} tokens a microbatch, on {gpu.name}, EP{layout.ep}; forward and backward, per rank",
        f"{'':<10}{'IB, MB':>9}{'NVLink, MB':>12}{'alone, ms':>11}{'beside computation, ms':>24}",
    ]
    for name in DISPATCHERS:
        f = figures(job, gpu, name)
        columns = (f"{f.infiniband / 1e6:>9.0f}", f"{f.nvlink / 1e6:>12.0f}", f"{f.seconds * 1e3:>11.1f}")
        lines.append(f"{name:<10}" + "".join(columns) + f"{f.beside * 1e3:>24.1f}")
    lines += [
        "",
        f"{'EP':>5}{'nodes':>7}" + "".join(f"{name + ', ms':>14}" for name in DISPATCHERS) + "  fastest",
    ]
    for ep, found in winners(job, gpu):
        times = [found[name].seconds * 1e3 for name in DISPATCHERS]
        best = DISPATCHERS[times.index(min(times))]
        nodes = max(1, ep // nvlink_domain(job, gpu))
        lines.append(f"{ep:>5}{nodes:>7}" + "".join(f"{ms:>14.2f}" for ms in times) + f"  {best}")
    return "\n".join(lines)


def as_dict(job: Job, gpu: Gpu) -> dict[str, object]:
    """For output=json."""
    sweep = {str(ep): {name: vars(f) for name, f in found.items()} for ep, found in winners(job, gpu)}
    return {"own": {name: vars(figures(job, gpu, name)) for name in DISPATCHERS}, "by_ep": sweep}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Print what the words ask for."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        print(USAGE)
        return
    options = parse(words)
    cfg = compose(options.overrides)
    start_megatron()
    from dsv3_megatron.plan.from_config import from_config

    planned = from_config(cfg, options.load_imbalance)
    if planned.job.layout.expert_ranks == 1:
        raise PlanError(
            "expert_model_parallel_size=1: nothing is dispatched; use a layout with expert parallelism"
        )
    if options.output == "json":
        print(json.dumps(as_dict(planned.job, planned.gpu)))
    else:
        print(table(planned.job, planned.gpu))


if __name__ == "__main__":
    main()
