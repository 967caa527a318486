"""Expert tensor parallelism: ranks that share experts hold parts of them, and receive all of their rows."""

from dataclasses import replace

import pytest

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.activations import blocks, by_part
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import Job
from dsv3_megatron.plan.operators import Operators
from dsv3_megatron.plan.parameters import held_by
from dsv3_megatron.plan.published import RUNS
from dsv3_megatron.plan.token_exchange import copies, seconds

H100 = GPUS["h100"]
RUN = next(run for run in RUNS if run.name.startswith("1024 H100, BF16, TP2 PP16 EP64"))
WHOLE = replace(RUN.job, capacity_factor=None)


def shared(job: Job, by: int, **changes: object) -> Job:
    """The same ranks, each expert on `by` of them."""
    return replace(job, layout=replace(job.layout, ep=job.layout.ep // by, etp=by), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [2, 4])
def test_a_rank_holds_and_computes_as_much(by: int) -> None:
    job = shared(WHOLE, by)
    assert job.layout.expert_ranks == WHOLE.layout.expert_ranks == 64
    assert job.layout.expert_shards == WHOLE.layout.expert_shards
    assert held_by(job, RUN.counts, (3,)).parts == held_by(WHOLE, RUN.counts, (3,)).parts
    # As many products, of more rows and less width; more bytes at the edges.
    assert job.routed_tokens * job.expert_width == WHOLE.routed_tokens * WHOLE.expert_width
    mine, theirs = (Operators(one, H100).moe_layer() for one in (job, WHOLE))
    assert theirs.mlp_w <= mine.mlp_w < 1.2 * theirs.mlp_w and mine.mlp_f > theirs.mlp_f


def test_activations_are_those_of_all_rows() -> None:
    parts = [by_part(blocks(one, one.stages[3])) for one in (WHOLE, shared(WHOLE, 2))]
    s, e = WHOLE.sizes, 2
    rows = WHOLE.tokens / 2 * s.moe_router_topk
    layers = WHOLE.stages[3].moe
    inputs = rows * (e * s.hidden_size + 4)  # and the rows' weights in fp32: there twice with two that share
    assert parts[1]["routed_experts"] - parts[0]["routed_experts"] == pytest.approx(layers * inputs)
    assert {name: parts[1][name] for name in parts[1] if name != "routed_experts"} == {
        name: parts[0][name] for name in parts[0] if name != "routed_experts"
    }


def test_all_to_all_goes_to_one_and_all_gather() -> None:
    """By hand: 2,048 tokens of 8 copies over 32 places of which 4 are in a node, and once more within the pair."""
    job = shared(WHOLE, 2)
    outside, inside = copies(job, 8)
    assert (outside, inside) == (pytest.approx(8 * 28 / 32), pytest.approx(8 * 3 / 32))
    row = 2048 * 7168 * 2
    a = H100.achieved
    ib = H100.ib * a.nccl_ib * (a.nccl_many / a.nccl_ib)
    gathered = 8 * row / (H100.nvlink * a.nvlink)
    assert seconds(job, H100, 2.0) == pytest.approx(2 * a.latency + outside * row / ib + gathered)


def test_deepep_sends_to_each_of_them() -> None:
    deepep = replace(WHOLE, dispatcher="flex", flex_backend="deepep")
    whole, pairs = copies(deepep, 8), copies(shared(deepep, 2), 8)
    assert pairs.ib == pytest.approx(whole.ib, rel=0.01)  # as many nodes hold an expert of a token
    assert whole.nvlink < pairs.nvlink < 2 * whole.nvlink
    alone = shared(replace(deepep, layout=replace(deepep.layout, ep=2)), 2)
    assert copies(alone, 8) == (0, pytest.approx(1))  # EP1: the other one of the pair


def test_one_rank_for_all_is_no_exchange() -> None:
    job = replace(deepseek.JOB, layout=replace(deepseek.JOB.layout, ep=1))
    assert seconds(job, H100, 2.0) == 0
    assert seconds(shared(replace(WHOLE, layout=replace(WHOLE.layout, ep=2)), 2), H100, 2.0) > 0
