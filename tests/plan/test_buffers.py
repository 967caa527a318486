"""What is no tensor of the model, by hand, and where the memory table has it."""

from dataclasses import replace

import pytest

from dsv3_megatron.plan import deepseek, report
from dsv3_megatron.plan.activations import blocks
from dsv3_megatron.plan.buffers import NCCL, dispatch_buffers, graph_pool, outside
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import Software
from dsv3_megatron.plan.published import ATTN_ROUTER, RUNS
from dsv3_megatron.plan.step import plan

H800, GB200 = GPUS["h800"], GPUS["gb200"]
RUN = next(run for run in RUNS if run.name == "256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP")


def test_deepep_over_eight_nodes() -> None:
    """Ten channels of two SMs: 8 peers with 288 rows each, and 8 nodes with 128 rows to send and to receive."""
    row = 2 * 7168 + 128 * (8 + 4 + 4)
    job = replace(deepseek.JOB, dispatcher="flex")
    assert dispatch_buffers(job, H800) == 10 * 8 * 288 * row + 10 * 8 * 128 * 2 * row
    inside = replace(job, layout=replace(job.layout, ep=8))
    assert dispatch_buffers(inside, H800) == 10 * 8 * 288 * row
    assert dispatch_buffers(replace(job, communication_sms=40), H800) == 2 * dispatch_buffers(job, H800)


def test_hybridep_has_room_for_all_tokens_of_the_group() -> None:
    assert dispatch_buffers(RUN.job, GB200) == 4096 * 64 * (2 * 7168 + 4 * 256)
    two_nodes = replace(
        RUN.job, layout=replace(RUN.job.layout, ep=16)
    )  # half of the experts in a domain of 8
    assert dispatch_buffers(two_nodes, GPUS["b200"]) == 4096 * 16 * (2 * 7168 + 4 * 128)


def test_nccl_is_a_part_of_the_stated_overhead() -> None:
    job = replace(deepseek.JOB, dispatcher="alltoall")
    found = outside(job, H800, job.stages[:1])
    assert found == {"dispatch buffers": NCCL, "CUDA graphs": 0, "overhead": H800.overhead - NCCL}
    alone = replace(job, layout=replace(job.layout, ep=1))
    assert outside(alone, H800, job.stages[:1])["overhead"] == H800.overhead


def test_graphs_share_a_pool() -> None:
    job, stages = RUN.job, RUN.job.stages[4:8]
    attention = blocks(job, stages[0])[0]
    place = 2 * 4096 * 7168
    assert graph_pool(job, stages) == attention.backward + 3 * place * 16
    assert graph_pool(replace(job, software=Software()), stages) == 0
    assert graph_pool(replace(job, whole_iteration_graph=True), stages) == 0
    router = replace(job, software=Software(graphs=ATTN_ROUTER - {"attn"}))
    assert graph_pool(router, stages) == 3 * place * 16  # no workspace of its own


def test_columns_of_the_table_add_up() -> None:
    result = plan(RUN.job, GB200, RUN.counts)
    table = report.memory_table(result)
    assert all(name in table for name in ("dispatch buffers", "CUDA graphs", "overhead"))
    for rank in result.memory:
        assert rank.peak == pytest.approx(sum(rank.parts.values()))
        assert rank.parts["CUDA graphs"] > 0 < rank.parts["dispatch buffers"]
    without = plan(
        replace(RUN.job, software=replace(RUN.job.software, graphs=frozenset())), GB200, RUN.counts
    )
    gone = result.memory[1].parts["CUDA graphs"] / 2**30
    assert max(result.memory_gib) > max(without.memory_gib)
    assert result.memory_gib[1] - without.memory_gib[1] == pytest.approx(gone)
