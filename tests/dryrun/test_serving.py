"""Dry runs of the layouts for serving: the report's §3.4, any rank, real groups and modules."""

import json

import pytest

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun import build_rank
from dsv3_megatron.dryrun.__main__ import main

# Published sizes; four layers of them where a test needs no more.
SHORT = ["model=v3_671b", "num_layers=4", 'moe_layer_freq="([0]*3+[1]*1)"']
EXPERT, DENSE = 3 * 7168 * 2048, 3 * 7168 * 18432


def report(layout: str, rank: int, words: list[str] = SHORT):
    return build_rank(compose([*words, f"layout={layout}"], serving=True), rank)


def test_a_rank_of_decoding():
    found = report("decode_tp4_dp80_ep320", 319)
    assert found.groups == {"dp": 80, "expt_dp": 1, "ep": 320, "pp": 1, "tp": 4, "cp": 1, "etp": 1}
    assert found.by_kind["routed_experts"] == 2 * EXPERT  # one slot in the MoE layer, one in MTP
    assert "shared_experts" not in found.by_kind
    assert found.by_kind["dense_mlp"] == 3 * DENSE  # whole, TP1
    slots = found.expert_slots
    assert slots is not None
    assert (slots["expert_slots"], slots["slots_per_rank"], slots["experts_in_slots"]) == (320, 1, 257)
    assert slots["most_copies"] == 32 and slots["shared_as_routed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "ranks"), [("prefill_tp4_dp8_ep32", range(32)), ("decode_tp4_dp80_ep320", range(320))]
)
def test_ranks_together_hold_every_expert(layout, ranks):
    """One after the other; routed experts are numbered from 0, the shared one of decoding comes after them."""
    held = []
    for rank in ranks:
        found = report(layout, rank)
        assert found.rank == rank and found.by_kind["dense_mlp"] == 3 * DENSE
        assert found.expert_slots is not None
        assert len(found.expert_slots["held_here"]) == found.expert_slots["slots_per_rank"]
        held += found.expert_slots["held_here"]
    wanted = (288, 256) if layout.startswith("prefill") else (320, 257)
    assert (len(held), len(set(held))) == wanted and set(held) == set(range(wanted[1]))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rank"), [("prefill_tp4_dp8_ep32", 31), ("decode_tp4_dp80_ep320", 0)])
def test_the_whole_model_is_counted_once(layout, rank):
    found = report(layout, rank, ["model=v3_671b"])
    assert round(found.total_parameters_without_mtp / 1e9, 2) == 671.03
    assert round(found.total_parameters / 1e9, 2) == 682.64


def test_a_rank_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["model=v3_671b", "layout=prefill_tp4_dp8_ep32", "rank=32"])
    assert "rank=32: the job has 32 ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_json_as_a_command(capsys):
    main([*SHORT, "layout=prefill_tp4_dp8_ep32", "rank=5", "output=json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["expert_slots"]["slots_per_rank"] == 9 and told["groups"]["tp"] == 4
