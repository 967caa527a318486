"""From operators to the costs of the pipeline's actions, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_megatron.pipeline import Costs
from dsv3_megatron.plan import host_time
from dsv3_megatron.plan.activations_te import offloaded
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.operators import LayerTimes, Operators


@dataclass(frozen=True)
class Pair:
    """The four slots of an overlapped pair of a layer, in seconds: what computes, and what communicates beside it.

    R§3.2.1 and the published trace: attention(F) and attention(W) beside combine(B); mlp(B) beside dispatch(F);
    mlp(W) and mlp(F) beside dispatch(B); attention(B) beside combine(F). Weight gradients that do not wait (Megatron's
    overlap without `--delay-wgrad-compute`) are in the slot of their input gradient.
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
    attention_f, attention_b, mlp_f, mlp_b = layer.attention_f, layer.attention_b, layer.mlp_f, layer.mlp_b
    if job.layout.wgrad_apart:
        attention_f, mlp_f = attention_f + layer.attention_w, mlp_f + layer.mlp_w
    else:
        attention_b, mlp_b = attention_b + layer.attention_w, mlp_b + layer.mlp_w
    computing = attention_f, mlp_b, mlp_f, attention_b + layer.again
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

    def plus(self, other: "StageTimes", number: float) -> "StageTimes":
        """With `number` times the other."""
        return StageTimes(
            self.f + number * other.f,
            self.b + number * other.b,
            self.w + number * other.w,
            self.fb + number * other.fb,
        )

    def recomputed(self, share: float) -> "StageTimes":
        """With the forward again before the backward, for a share of the layers."""
        return StageTimes(self.f, self.b + share * self.f, self.w, self.fb + share * self.f)


def stage_times(job: Job, gpu: Gpu, stage: Stage, operators: Operators | None = None) -> StageTimes:
    """Sum over the stage's layers and ends."""
    ops = operators or Operators(job, gpu)
    num_moe = stage.moe + stage.mtp
    total = _layers(job, gpu, ops.dense_layer(), None, stage.dense, moe=False)
    total = total.plus(_layers(job, gpu, ops.moe_layer(), ops.moe_layer(beside=True), num_moe, moe=True), 1)
    again = job.recomputed_layers(stage.dense + stage.moe) / max(1, stage.dense + stage.moe)
    total = total.recomputed(again)
    ends = []
    if stage.head:
        # An MTP layer's loss is taken where the model's is, also where the layer has a stage of its own.
        ends.append(ops.head(1 + job.sizes.mtp_num_layers))
    ends += [ops.mtp_projection()] * stage.mtp
    for end_f, end_b, end_w in ends:
        total = total.plus(StageTimes(end_f, end_b, end_w, end_f + end_b), 1)
    # Activations on their way to host memory and back, beside everything else.
    away = offloaded(job, stage) / gpu.host.link
    return (
        StageTimes(max(total.f, away), max(total.b, away), total.w, max(total.fb, 2 * away))
        if away
        else total
    )


class _Segment(NamedTuple):
    """Of a pass: what the GPU computes, what the host takes to launch it, and whether the host first waits."""

    gpu: float
    host: float = 0
    waits: bool = False


def _seconds(segments: Sequence[_Segment], times: int) -> float:
    """Of so many repetitions: the host runs ahead as far as it may, and the GPU ends nothing before it is launched.

    So what is long on the GPU and one launch (a combine) hides the host's work on what follows, not on what came
    before it.
    """
    gpu = host = 0.0
    for segment in (*segments,) * times:
        if segment.waits:
            host = max(host, gpu)
        host += segment.host
        gpu = max(gpu + segment.gpu, host)
    return gpu


def _layers(
    job: Job, gpu: Gpu, alone: LayerTimes, beside: LayerTimes | None, number: int, *, moe: bool
) -> StageTimes:
    """The passes of so many layers of one kind."""
    host_f, host_b = _host(job, gpu, moe)
    forward = (
        _Segment(alone.attention_f, host_f[0]),
        _Segment(alone.dispatch, waits=moe and host_time.waits(job)),
        _Segment(alone.mlp_f, host_f[1]),
        _Segment(alone.combine),
    )
    backward = (
        _Segment(alone.combine_b),
        _Segment(alone.mlp_b + alone.mlp_w + alone.again, host_b[1]),
        _Segment(alone.dispatch_b),
        _Segment(alone.attention_b + alone.attention_w, host_b[0]),
    )
    f, b = _seconds(forward, number), _seconds(backward, number)
    fb = f + b
    if beside is not None and job.layout.overlap_pairs and job.layout.expert_ranks > 1:
        one = max(pair(alone, beside, job, gpu).length, sum(host_f) + sum(host_b))
        fb = min(fb, number * one)
    return StageTimes(f, b, min(number * alone.w, b), fb)


def _host(job: Job, gpu: Gpu, moe: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of the host in the forward and in the backward: of the first and of the second part of a layer."""
    software = job.software
    if software.own_kernels or job.whole_iteration_graph:
        return (0, 0), (0, 0)
    host, parts = gpu.host, host_time.parts(job, moe)
    forward, backward = (
        tuple(host.seconds(part[way], software) for part in (parts.first, parts.second)) for way in (0, 1)
    )
    return forward, backward  # type: ignore[return-value]


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
