"""Moonlight's lines on few machines: what a machine holds, overlap without a pipeline, recompute by layers, offload."""

import pytest

from dsv3_megatron.pipeline import build_schedule
from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan.__main__ import planned_of
from dsv3_megatron.plan.activations import footprint
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.options import parse
from dsv3_megatron.plan.stage_times import stage_times
from dsv3_megatron.plan.step import Plan, plan
from dsv3_megatron.plan.token_exchange import nvlink_domain

MODEL = (
    "--num-layers 27 --hidden-size 2048 --ffn-hidden-size 11264 --num-attention-heads 16 --multi-latent-attention "
    "--kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --num-experts 64 "
    "--moe-ffn-hidden-size 1408 --moe-router-topk 6 --moe-shared-expert-intermediate-size 2816 "
    "--moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope --vocab-size 163840 "
    "--seq-length 4096 --max-position-embeddings 8192 --lr 1e-4 --train-iters 10 --bf16 --use-distributed-optimizer "
    "--global-batch-size 256"
)
FREQUENCY = "--moe-layer-freq '([0]+[1]*26)'"


def found(words: str, nodes: int = 1, per_node: int = 8, gpu: str = "h100", frequency: str = FREQUENCY):
    line = (
        f"torchrun --nnodes {nodes} --nproc-per-node {per_node} pretrain_gpt.py {MODEL} {frequency} {words}"
    )
    return planned_of(parse(["--launch", line, f"gpu={gpu}"]))


def planned(words: str, **where) -> Plan:
    of = found(words, **where)
    return plan(of.job, of.gpu, of.counts)


def peak(of: Plan) -> float:
    return max(of.memory_gib)


def test_experts_reach_over_nvlink_as_far_as_a_machine_has_gpus() -> None:
    words = "--expert-model-parallel-size 16 --micro-batch-size 1"
    steps = [planned(words, nodes=16 // n, per_node=n).step_s for n in (8, 4, 1)]
    assert steps == sorted(steps) and steps[0] < 0.9 * steps[1] < 0.9 * steps[2]
    said = planned(f"{words} --nvlink-domain-size 4", nodes=2).step_s
    assert said == steps[1]
    assert planned(f"{words} --nvlink-domain-size 8", nodes=4, per_node=4).step_s == steps[0]


def test_a_racks_domain_is_no_machine() -> None:
    of = found("--expert-model-parallel-size 16 --micro-batch-size 1", nodes=4, per_node=4, gpu="gb200")
    assert nvlink_domain(of.job, of.gpu) == 72


@pytest.mark.parametrize("gpu, per_node", [("h100", 16), ("gb200", 8)])
def test_a_machine_with_more_gpus_than_there_are(gpu: str, per_node: int) -> None:
    with pytest.raises(PlanError, match=f"gpus_per_node={per_node}: a machine of {gpu} has {GPUS[gpu].node}"):
        found("--expert-model-parallel-size 8 --micro-batch-size 1", per_node=per_node, gpu=gpu)


OVERLAP = "--micro-batch-size 2 --expert-model-parallel-size 16 --overlap-moe-expert-parallel-comm"


def test_one_stage_overlaps_a_microbatch_with_the_one_before() -> None:
    """The step is what Megatron runs: a forward, pairs, a backward; the pairs are shorter than their two passes."""
    table = build_schedule(INTERLEAVED, 1, 4, num_model_chunks=1)
    assert [str(action) for action in table.ranks[0]] == [
        "F0@0",
        "F1@0&B0@0",
        "F2@0&B1@0",
        "F3@0&B2@0",
        "B3@0",
    ]
    apart = planned(OVERLAP.removesuffix(" --overlap-moe-expert-parallel-comm"), nodes=2)
    beside = planned(f"{OVERLAP} --delay-wgrad-compute", nodes=2)
    of = stage_times(beside.job, beside.gpu, beside.job.stages[0], Operators(beside.job, beside.gpu))
    pairs = beside.job.num_microbatches - 1
    assert beside.simulation.makespan == pytest.approx(of.f + pairs * of.fb + of.b)
    assert of.fb < of.f + of.b and beside.step_s < apart.step_s
    # Layer by layer the forward fills what the backward leaves: one layer more is there, not a microbatch.
    size = footprint(beside.job, beside.job.stages[0])
    assert 0 < peak(beside) - peak(apart) < 0.5 * size.kept / 2**30


@pytest.mark.parametrize("ranks, chunks", [(1, 2), (2, 1)])
def test_one_stage_is_the_only_table_without_interleaving(ranks: int, chunks: int) -> None:
    with pytest.raises(ValueError, match="at least 2 of each, or one stage in all"):
        build_schedule(INTERLEAVED, ranks, 4, num_model_chunks=chunks)


def uniform(layers: int) -> Plan:
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
    return planned(f"--expert-model-parallel-size 8 --micro-batch-size 4 {full} {layers}")


def test_layers_that_are_computed_again_at_once_are_there_at_once() -> None:
    plain = planned("--expert-model-parallel-size 8 --micro-batch-size 4")
    peaks = {layers: peak(uniform(layers)) for layers in (1, 9, 26, 27, 40)}
    assert peaks[1] <= peaks[9] < peaks[26] < peaks[27] == peaks[40] < peak(plain)
    all_at_once, one = (footprint(uniform(n).job, plain.job.stages[0]) for n in (27, 1))
    kept = footprint(plain.job, plain.job.stages[0]).kept
    assert all_at_once.kept < one.kept < 0.5 * kept
    # What the head keeps, the most of the rest, has gone when the layers are there again.
    assert kept - all_at_once.kept < all_at_once.backward < kept


def test_an_optimizer_in_host_memory_takes_host_memory() -> None:
    words = "--expert-model-parallel-size 8 --micro-batch-size 1 --use-precision-aware-optimizer"
    words += " --optimizer-cpu-offload --optimizer-offload-fraction"
    whole, half, none = (found(f"{words} {fraction}") for fraction in (1, 0.5, 0))
    assert whole.host is not None and half.host is not None and none.host is not None
    # Of one machine with one replica of the experts: each parameter once, 16 bytes.
    experts = 26 * 64 * 3 * 2048 * 1408
    assert 16 * experts < whole.host.optimizer < 16 * 1.25 * experts
    assert half.host.optimizer == whole.host.optimizer / 2 and none.host.optimizer == 0
    assert whole.host.peak == max(whole.host.save, whole.host.load) + whole.host.optimizer


def test_one_rank_with_all_experts_has_an_even_load() -> None:
    words = "--expert-model-parallel-size {} --micro-batch-size 1"
    assert found(words.format(1), gpu="h200").job.load_imbalance == 1
    assert found(words.format(8), gpu="h200").job.load_imbalance == 1.075


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            "--optimizer-cpu-offload --optimizer-offload-fraction 7",
            "offload_fraction=7.0: use a number from 0 to 1",
        ),
        (
            "--optimizer-cpu-offload --optimizer-offload-fraction -1",
            "optimizer_offload_fraction=-1.0: a number of at",
        ),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers -3",
            "recompute_num_layers=-3: a number of at least 0",
        ),
        ("--nvlink-domain-size -4", "nvlink_domain_size=-4: a number of at least 1"),
        ("--moe-token-dispatcher-type flex --moe-deepep-num-sms 132", "moe_deepep_num_sms=132: h100 has 132"),
        (
            "--moe-token-dispatcher-type flex --moe-deepep-num-sms -20",
            "moe_deepep_num_sms=-20: a number of at",
        ),
        (
            "--moe-expert-capacity-factor 0 --moe-pad-expert-input-to-capacity",
            "moe_expert_capacity_factor=0: an expert would take no token",
        ),
        ("--micro-batch-size 3", "micro_batch_size=3 × 8 data-parallel ranks: use a multiple of 24"),
        ("--fp16", "bf16 and fp16 are both given: leave one out"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: str, expected: str) -> None:
    with pytest.raises(PlanError, match=expected.replace("(", r"\(")):
        found(f"--micro-batch-size 1 --expert-model-parallel-size 8 {words}")


@pytest.mark.parametrize("layers", [10, 40])
def test_a_pattern_of_other_layers_than_there_are(layers: int) -> None:
    with pytest.raises(PlanError, match=f"is of {layers + 1} layers, but num_layers=27"):
        found(
            "--micro-batch-size 1 --expert-model-parallel-size 8",
            frequency=f"--moe-layer-freq '([0]+[1]*{layers})'",
        )
