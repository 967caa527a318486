"""A published run as a job, and what such jobs are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.job import Job, Layout, Precision, Software, Stage, megatrons_schedule
from dsv3_megatron.plan.parameters import ParameterCounts, counts_of_sizes

# "fitted": a constant was fitted on it. "judge": none was, but the form of the model was settled with it in view.
# "opened": neither; it was collected unseen and opened once, when the form had been settled. "apart": what decides its
# time is not published, so that it judges nothing.
Half = Literal["fitted", "judge", "opened", "apart"]


@dataclass(frozen=True)
class Run:
    """One published result.

    Attributes:
        step_s: seconds of a step, as published or from published tokens or TFLOP per second and GPU.
        half: what it was used for.
        peak_gib: most memory that PyTorch had allocated on the fullest rank, where it was published.
        device_gib: most memory of the device that was in use, likewise.
        assumed: what the source leaves open.
    """

    name: str
    gpu: str
    job: Job
    step_s: float
    half: Half
    source: str
    assumed: str = ""
    peak_gib: float | None = None
    device_gib: float | None = None

    @property
    def counts(self) -> ParameterCounts:
        """Parameters of its model."""
        return counts_of_sizes(self.job.sizes, self.job.layout.tp)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.job.tokens_per_step / self.step_s / self.job.layout.num_gpus


def stages(layers: Sequence[int], mtp: int, dense: int = 3) -> tuple[Stage, ...]:
    """Stages of so many decoder layers, whose first ones are dense; MTP and head on the last."""
    result, first = [], 0
    for index, count in enumerate(layers):
        of_them = max(0, min(dense - first, count))
        last = index == len(layers) - 1
        result.append(Stage(of_them, count - of_them, mtp if last else 0, embedding=index == 0, head=last))
        first += count
    return tuple(result)


# "Et*3|(tt|)*29m|L", which the paper prints: MTP and loss have stages of their own.
PAPER_STAGES = (*stages([3] + [2] * 29, 0)[:-1], Stage(moe=2), Stage(mtp=1), Stage(head=True))
# Layers of each stage: "Et|(tt|)*30mL", "Et*4|(t*4|)*14tmL", and one or two stages of 8 or 16 ranks.
STAGES_32 = [1] + [2] * 30 + [0]
STAGES_16 = [4] * 15 + [1]
STAGES_8 = [8] * 7 + [5]
BF16, MXFP8, BLOCKWISE, TENSORWISE = (
    Precision(),
    Precision(fp8=True, recipe="mxfp8", fp8_parameters=True),
    Precision(fp8=True, recipe="blockwise"),
    Precision(fp8=True, recipe="tensorwise", fp8_parameters=True, main_gradient=2),
)
# BF16 gradients, which the recipes of Megatron-Bridge have.
BF16_GRADIENTS = replace(BF16, main_gradient=2)
MXFP8_BRIDGE = replace(MXFP8, main_gradient=2)
ATTN_ROUTER = frozenset({"attn", "router", "preprocess", "shared_experts"})


def megatron(
    *,
    num_gpus: int,
    pp: int,
    ep: int,
    batch: int,
    layers: Sequence[int],
    recompute: set[str],
    precision: Precision,
    dispatcher: str,
    tp: int = 1,
    micro: int = 1,
    mtp: int = 1,
    dense: int = 3,
    overlap_pairs: bool = False,
    communication_sms: int | None = 20,
    whole_iteration_graph: bool = False,
    shared_expert_overlap: bool = False,
    overlap_grad_reduce: bool = True,
    drop: bool = False,
    load_imbalance: float = 1.0,
    experts: int = 256,
    seq: int = 4096,
    vocab: int = 129_280,
    recompute_layers: int | None = None,
    software: Software | None = None,
) -> Job:
    """A job of Megatron's on DeepSeek-V3's layers; `dispatcher`: "alltoall", "deepep" or "hybridep"."""
    chunks = len(layers) // pp
    total = sum(layers)
    return Job(
        sizes=replace(
            deepseek.SIZES,
            mtp_num_layers=mtp,
            num_layers=total,
            num_moe_layers=total - dense,
            num_moe_experts=experts,
            seq_length=seq,
            padded_vocab_size=vocab,
        ),
        layout=Layout(
            num_gpus=num_gpus,
            tp=tp,
            pp=pp,
            ep=ep,
            schedule=megatrons_schedule(pp, chunks, overlap_pairs),
            num_model_chunks=chunks,
            overlap_pairs=overlap_pairs,
        ),
        stages=stages(layers, mtp, dense),
        global_batch_size=batch,
        micro_batch_size=micro,
        precision=precision,
        recompute=frozenset(recompute),
        recompute_layers=recompute_layers,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_grad_reduce,  # Megatron's goes with it
        dispatcher="alltoall" if dispatcher == "alltoall" else "flex",
        flex_backend=dispatcher if dispatcher != "alltoall" else "deepep",
        capacity_factor=1.0 if drop else None,
        load_imbalance=load_imbalance,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        communication_sms=communication_sms,
        whole_iteration_graph=whole_iteration_graph,
        shared_expert_overlap=shared_expert_overlap,
        software=software or Software(cross_entropy="te"),
    )


def of_rate(job: Job, tokens_per_s_per_gpu: float) -> float:
    """Seconds of a step."""
    return job.tokens_per_step / tokens_per_s_per_gpu / job.layout.num_gpus


def rated(
    name: str,
    gpu: str,
    job: Job,
    rate: float,
    half: Half,
    source: str,
    assumed: str = "",
    peak: float | None = None,
) -> Run:
    """A run that was published in tokens per second and GPU."""
    return Run(name, gpu, job, of_rate(job, rate), half, source, assumed, peak)
