"""The three dispatchers in the planner: the bytes of dispatch's own expectation, and who is faster where."""

import json
from dataclasses import replace

import pytest

from dsv3_megatron.dispatch import expected_bytes
from dsv3_megatron.plan import deepseek, dispatchers
from dsv3_megatron.plan.destinations import destinations
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.token_exchange import copies

H800 = GPUS["h800"]
JOB = replace(deepseek.JOB, load_imbalance=1.0)


@pytest.mark.parametrize("dispatcher", dispatchers.DISPATCHERS)
@pytest.mark.parametrize("fp8", [True, False])
def test_bytes_are_those_of_the_expectation(dispatcher, fp8):
    """The planner's closed form takes every chosen group as used (0.9% more nodes), and leaves weights out (0.5%)."""
    job = replace(JOB, precision=replace(JOB.precision, fp8_dispatch=fp8))
    found = dispatchers.figures(job, H800, dispatcher)
    wanted = expected_bytes(job.tokens, 8, 8, 4, "fp8" if fp8 else "bf16", dispatcher=dispatcher)
    assert found.infiniband == pytest.approx(wanted.infiniband, rel=0.03)
    assert found.nvlink == pytest.approx(wanted.nvlink, rel=0.03)


def test_copies_by_hand():
    to = destinations(JOB, 8)  # 64 ranks on 8 nodes; of the others 7 have the same index
    flex = copies(replace(JOB, dispatcher="flex"), 8)
    assert flex == (to.domains, pytest.approx(to.ranks * 64 / 63 * 7 / 8))
    assert flex == copies(replace(JOB, dispatcher="two_hop"), 8)
    far, near = copies(replace(JOB, dispatcher="alltoall"), 8)
    assert (far, near) == (pytest.approx(8 * 7 / 8), pytest.approx(8 / 8 * 7 / 8))
    nodes, pairs = copies(replace(JOB, dispatcher="two_hop"), 8, back=True)
    assert (nodes, pairs) == (pytest.approx(4 * 7 / 8), pytest.approx(8 * 7 / 8))
    assert copies(replace(JOB, dispatcher="two_hop"), 8)[1] < pairs


def test_where_each_wins():
    rows = dict(dispatchers.winners(JOB, H800))
    assert set(rows) == {2, 4, 8, 16, 32, 64, 128}
    for ep, found in rows.items():
        assert found["flex"].seconds <= found["two_hop"].seconds < found["alltoall"].seconds
        assert (found["alltoall"].infiniband == 0) == (ep <= 8)
    gain = {ep: found["alltoall"].seconds / found["two_hop"].seconds for ep, found in rows.items()}
    assert gain[32] > 2 and gain[8] < 1.15


def test_more_chunks_are_faster_and_the_job_is_planned_with_its_dispatcher():
    few, many = (
        dispatchers.figures(replace(JOB, dispatch_chunks=n), H800, "two_hop").seconds for n in (1, 10)
    )
    assert many < few
    line = dispatchers.dispatch_line(replace(JOB, dispatcher="two_hop"), H800)
    assert line.startswith("two_hop, E4M3, one copy per node: ")
    everywhere = dispatchers.dispatch_line(replace(JOB, dispatcher="allgather"), H800)
    assert "one copy per rank: " in everywhere


def test_command(capsys):
    words = ["model=v3_671b", "layout=pp16_ep64", "cluster=h800_2048"]
    dispatchers.main([*words, "output=json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["own"]) == set(dispatchers.DISPATCHERS) and "64" in found["by_ep"]
    assert found["own"]["two_hop"]["infiniband"] <= 0.501 * found["own"]["alltoall"]["infiniband"]
    dispatchers.main([*words, "communication_sms=32"])
    out = capsys.readouterr().out
    assert "two_hop" in out and "fastest" in out
    with pytest.raises(SystemExit):
        dispatchers.main(["model=tiny", "layout=cpu_single", "cluster.gpu=h800"])
    assert "expert_model_parallel_size=1" in capsys.readouterr().err
