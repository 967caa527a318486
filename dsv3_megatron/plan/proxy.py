"""What to measure before a job: `dsv3 plan … --proxy`, a small job whose run is an anchor (`anchor.py`).

All of the job's kernels at their sizes: its sequence, precision, recompute, tensor and context parallelism, and as many
experts per rank; the experts' group is a node's, the pipeline is left out. One node, or as few as these sizes divide;
its microbatch and three MoE layers, or what of them fits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job, PlanError, Stage, megatrons_schedule

_MOE_LAYERS = 3


@dataclass(frozen=True)
class Proxy:
    """The recipe.

    Attributes:
        dense, moe: decoder layers of each kind.
        experts, ep: routed experts of a layer, and ranks over which they are spread; 0 and 1 without MoE layers.
        nodes, per_node: machines, and GPUs of each.
        micro_batch, batch: sequences of a microbatch, of a step.
        why: the recipe in words.
    """

    dense: int
    moe: int
    experts: int
    ep: int
    nodes: int
    per_node: int
    micro_batch: int
    batch: int
    why: str


def recipes(job: Job, gpu: Gpu) -> Iterator[Proxy]:
    """Of a job, the best first, whether they fit or not: fewer layers, then smaller microbatches.

    Raises:
        PlanError: no number of nodes up to the job's own divides.
    """
    s, layout = job.sizes, job.layout
    nodes, ep = _spread(job, gpu)
    world = nodes * gpu.node
    num_dense = s.num_layers - s.num_moe_layers
    dense = min(1 if s.num_moe_layers else 1 + _MOE_LAYERS, num_dense)
    most = min(_MOE_LAYERS, s.num_moe_layers)
    micro = job.micro_batch_size
    shapes = [(dense, moe, micro) for moe in range(most, 0, -1)] or [
        (fewer, 0, micro) for fewer in range(dense, 0, -1)
    ]
    while micro > 1:
        micro //= 2
        shapes.append((*shapes[-1][:2], micro))
    of_ranks = f"TP{layout.tp} CP{layout.cp}" + (f" EP{ep} ETP{layout.etp}" if s.num_moe_layers else "")
    for dense, moe, micro in shapes:
        layers = f"{dense} dense and {moe} MoE layers" if s.num_moe_layers else f"{dense} dense layers"
        where = (
            f"one node of {gpu.node}"
            if nodes == 1
            else f"{nodes} nodes of {gpu.node}, which {of_ranks} needs"
        )
        experts = f", {job.local_experts} experts per rank as in the job" if s.num_moe_layers else ""
        less = f" (the job's {job.micro_batch_size} do not fit)" if micro < job.micro_batch_size else ""
        why = (
            f"{layers} on {where}{experts}, microbatches of {micro}{less}, eight per rank: every kernel at the job's "
            "size, no pipeline"
        )
        batch = 8 * micro * (world // (layout.tp * layout.cp))
        num_experts = job.local_experts * ep if s.num_moe_layers else 0
        yield Proxy(dense, moe, num_experts, ep, nodes, gpu.node, micro, batch, why)


def _spread(job: Job, gpu: Gpu) -> tuple[int, int]:
    """The fewest nodes, and the expert-parallel ranks on them: those of a node, or more if the router asks for them."""
    layout, moe = job.layout, job.sizes.num_moe_layers > 0
    sizes = [ep for ep in range(1, layout.ep + 1) if layout.ep % ep == 0] if moe else [1]
    on_node = max(1, gpu.node // layout.etp)
    sizes.sort(key=lambda ep: (ep > on_node, ep if ep > on_node else -ep))
    for nodes in range(1, max(1, -(-layout.num_gpus // gpu.node)) + 1):
        world = nodes * gpu.node
        if world % (layout.tp * layout.cp):
            continue
        for ep in sizes:
            if not moe or (world % (ep * layout.etp) == 0 and _routes(job, job.local_experts * ep)):
                return nodes, ep
    raise PlanError(
        f"--proxy: on no number of nodes of {gpu.node} {gpu.name} do tensor_model_parallel_size={layout.tp} × "
        f"context_parallel_size={layout.cp} and the experts divide; measure the job itself"
    )


def _routes(job: Job, experts: int) -> bool:
    """Whether the job's router can choose among so many."""
    topk, groups, chosen = job.sizes.moe_router_topk, job.moe_router_num_groups, job.moe_router_group_topk
    return experts % groups == 0 and experts >= topk and experts // groups * chosen >= topk


def small_job(job: Job, recipe: Proxy) -> Job:
    """What the recipe says, of a job; with Megatron's schedule, whatever the job's is."""
    layout = job.layout
    overlap = layout.overlap_pairs and layout.schedule in ("1f1b", INTERLEAVED)
    return replace(
        job,
        sizes=replace(
            job.sizes,
            num_layers=recipe.dense + recipe.moe,
            num_moe_layers=recipe.moe,
            num_moe_experts=recipe.experts,
            mtp_num_layers=0,
        ),
        layout=replace(
            layout,
            num_gpus=recipe.nodes * recipe.per_node,
            pp=1,
            ep=recipe.ep,
            schedule=megatrons_schedule(1, 1, overlap),
            num_model_chunks=1,
            microbatch_group_size=None,
            zigzag=(),
        ),
        stages=(Stage(recipe.dense, recipe.moe, embedding=True, head=True),),
        micro_batch_size=recipe.micro_batch,
        global_batch_size=recipe.batch,
    )


# Of the pipeline that is left out; also what begins with `_DEALT`.
_PIPELINE = (
    "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
    "microbatch_group_size_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "placement.last_stage_extra", "pipeline_costs",
)  # fmt: skip
_DEALT = "pipeline_zigzag_"


def overrides(recipe: Proxy, given: Sequence[str]) -> list[str]:
    """Words of `dsv3 plan`: the job's own, less what the recipe says anew."""
    words = {
        "num_layers": str(recipe.dense + recipe.moe),
        "mtp_num_layers": "0",
        "pipeline_model_parallel_size": "1",
        "pipeline_model_parallel_layout": "null",
        "schedule": "1f1b",
        "cluster.nodes": str(recipe.nodes),
        "cluster.gpus_per_node": str(recipe.per_node),
        "micro_batch_size": str(recipe.micro_batch),
        "global_batch_size": str(recipe.batch),
    }
    if recipe.moe:
        words |= {
            "moe_layer_freq": f'"([0]*{recipe.dense}+[1]*{recipe.moe})"',
            "num_experts": str(recipe.experts),
            "expert_model_parallel_size": str(recipe.ep),
        }

    def left_out(word: str) -> bool:
        name = word.partition("=")[0].lstrip("+")
        return name in words or name in _PIPELINE or name.startswith(_DEALT)

    kept = [word for word in given if not left_out(word)]
    return [*kept, *(f"{name}={value}" for name, value in words.items())]


# Of a launch line: what the recipe leaves out, with its value.
LEFT_OUT = (
    "--pipeline-model-parallel-layout", "--num-layers-per-virtual-pipeline-stage", "--mtp-num-layers",
    "--num-virtual-stages-per-pipeline-rank", "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers", "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split", "--microbatch-group-size-per-virtual-pipeline-stage",
)  # fmt: skip


def options(recipe: Proxy) -> str:
    """Of a launch line, after its own; of two the later one counts."""
    experts = (
        f" --moe-layer-freq '([0]*{recipe.dense}+[1]*{recipe.moe})' --num-experts {recipe.experts} "
        f"--expert-model-parallel-size {recipe.ep}"
    )
    return (
        f"--num-layers {recipe.dense + recipe.moe}{experts if recipe.moe else ''} --pipeline-model-parallel-size 1 "
        f"--micro-batch-size {recipe.micro_batch} --global-batch-size {recipe.batch}"
    )
