"""What to measure before a job: `dsv3 plan … --proxy`, a small job on one node whose run is an anchor (`anchor.py`).

All of the job's kernels at their sizes: its sequence, microbatch, precision, recompute, tensor parallelism, and as many
experts per rank; the experts' group is a node's, the pipeline is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import Job

_MOE_LAYERS = 3


@dataclass(frozen=True)
class Proxy:
    """The recipe.

    Attributes:
        dense, moe: decoder layers of each kind.
        experts, ep: routed experts of a layer, and ranks over which they are spread.
        batch: sequences of a step.
        why: the recipe in words.
    """

    dense: int
    moe: int
    experts: int
    ep: int
    batch: int
    why: str


def proxy(job: Job, gpu: Gpu) -> Proxy:
    """Of a job, on one node of its GPUs."""
    s, layout = job.sizes, job.layout
    ep = min(max(1, gpu.node // layout.etp), layout.ep)
    dense = min(1, s.num_layers - s.num_moe_layers)
    moe = min(_MOE_LAYERS, s.num_moe_layers)
    batch = 8 * job.micro_batch_size * max(1, gpu.node // (layout.tp * layout.cp))
    why = (
        f"{dense} dense and {moe} MoE layers on one node of {gpu.node}, {job.local_experts} experts per rank as in the "
        f"job, microbatches of {job.micro_batch_size}, eight per rank: every kernel at the job's size, no pipeline"
    )
    return Proxy(dense, moe, job.local_experts * ep, ep, batch, why)


def overrides(recipe: Proxy, given: Sequence[str]) -> list[str]:
    """Words of `dsv3 plan`: the job's own, less what the recipe says anew."""
    words = {
        "num_layers": str(recipe.dense + recipe.moe),
        "moe_layer_freq": f'"([0]*{recipe.dense}+[1]*{recipe.moe})"',
        "mtp_num_layers": "0",
        "num_experts": str(recipe.experts),
        "expert_model_parallel_size": str(recipe.ep),
        "pipeline_model_parallel_size": "1",
        "pipeline_model_parallel_layout": "null",
        "schedule": "1f1b",
        "cluster.nodes": "1",
        "global_batch_size": str(recipe.batch),
    }
    kept = [word for word in given if word.partition("=")[0] not in words]
    return [*kept, *(f"{name}={value}" for name, value in words.items())]


# Of a launch line: what the recipe leaves out, with its value.
LEFT_OUT = (
    "--pipeline-model-parallel-layout", "--num-layers-per-virtual-pipeline-stage", "--mtp-num-layers",
    "--num-virtual-stages-per-pipeline-rank", "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
)  # fmt: skip


def options(recipe: Proxy) -> str:
    """Of a launch line, after its own; of two the later one counts."""
    return (
        f"--num-layers {recipe.dense + recipe.moe} --moe-layer-freq '([0]*{recipe.dense}+[1]*{recipe.moe})' "
        f"--num-experts {recipe.experts} --expert-model-parallel-size {recipe.ep} --pipeline-model-parallel-size 1 "
        f"--global-batch-size {recipe.batch}"
    )
