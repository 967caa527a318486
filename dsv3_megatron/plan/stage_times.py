"""From operators to the costs of the pipeline's actions, stage by stage."""

from dataclasses import dataclass

from dsv3_megatron.pipeline import Costs
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.operators import LayerTimes, Operators


@dataclass(frozen=True)
class Pair:
    """The four slots of an overlapped pair of a layer, in seconds: what computes, and what communicates beside it.

    R§3.2.1 and the published trace: attention(F) and attention(W) beside combine(B); mlp(B) beside dispatch(F);
    mlp(W) and mlp(F) beside dispatch(B); attention(B) beside combine(F).
    """

    compute: tuple[float, float, float, float]
    communicate: tuple[float, float, float, float]
    gap: float

    @property
    def length(self) -> float:
        """Each slot lasts as long as the longer of its two."""
        return sum(map(max, self.compute, self.communicate)) + self.gap


def pair(layer: LayerTimes, beside: LayerTimes, job: Job, gpu: Gpu) -> Pair:
    """The pair of two microbatches' passes of one layer.

    layer, beside: the layer's times with its communication alone, and beside computation.
    """
    a = gpu.achieved
    computing = (
        layer.attention_f + layer.attention_w,
        layer.mlp_b,
        layer.mlp_w + layer.mlp_f,
        layer.attention_b + layer.again,
    )
    communicating = beside.combine_b, beside.dispatch, beside.dispatch_b, beside.combine
    if job.communication_sms is None:
        slower = gpu.sms / (gpu.sms - a.communication_sms)
        computing = tuple(slower * seconds for seconds in computing)  # type: ignore[assignment]
    else:  # what the SMs would have computed while they communicated is computed later
        taken = job.communication_sms / gpu.sms
        both = zip(computing, communicating, strict=True)
        computing = tuple(seconds + taken * beside for seconds, beside in both)  # type: ignore[assignment]
    return Pair(computing, communicating, 0 if job.whole_iteration_graph else a.pair_gap)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a microbatch's passes of one stage; `fb` of an overlapped pair of two of them."""

    f: float
    b: float
    w: float
    fb: float


def stage_times(job: Job, gpu: Gpu, stage: Stage, operators: Operators | None = None) -> StageTimes:
    """Sum over the stage's layers and ends."""
    ops = operators or Operators(job, gpu)
    dense, moe = ops.dense_layer(), ops.moe_layer()
    num_moe = stage.moe + stage.mtp
    f = stage.dense * dense.f + num_moe * moe.f
    b = stage.dense * dense.b + num_moe * moe.b
    w = stage.dense * dense.w + num_moe * moe.w
    fb = stage.dense * (dense.f + dense.b)
    overlaps = job.layout.overlap_pairs and job.layout.ep > 1
    paired = (
        min(pair(moe, ops.moe_layer(beside=True), job, gpu).length, moe.f + moe.b)
        if overlaps
        else moe.f + moe.b
    )
    fb += num_moe * paired
    ends = []
    if stage.head:
        ends.append(ops.head(1 + stage.mtp))
    ends += [ops.mtp_projection()] * stage.mtp
    for end_f, end_b, end_w in ends:
        f, b, w, fb = f + end_f, b + end_b, w + end_w, fb + end_f + end_b
    return StageTimes(f, b, w, fb)


def costs(job: Job, gpu: Gpu) -> Costs:
    """Costs of all stages, for the simulator."""
    ops = Operators(job, gpu)
    known: dict[Stage, StageTimes] = {}
    for stage in job.stages:
        if stage not in known:
            known[stage] = stage_times(job, gpu, stage, ops)
    times = [known[stage] for stage in job.stages]
    columns = {name: [getattr(t, name) for t in times] for name in ("f", "b", "w", "fb")}
    return Costs(**columns, p2p=ops.message() if job.layout.pp > 1 else 0)
