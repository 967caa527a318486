"""The trainer with tokens in two hops: alltoall's losses over 20 steps of DualPipe with MTP, and bytes as expected."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.demo.results import read_curves
from dsv3_megatron.dispatch import expected_bytes
from tests.harness import run_distributed

STEPS = 20
LOSSES = ("lm loss", "mtp_1 loss", "seq_load_balancing_loss")
MODEL = ["model=tiny", "layout=cpu_pp2_ep2", "device=cpu", f"train_iters={STEPS}", "lr=1e-3", "eval_iters=0"]
MODEL += ["seq_length=64", "max_position_embeddings=64", "global_batch_size=8", "micro_batch_size=1"]
MODEL += ["tensorboard_log_interval=1", "log_interval=1"]


def train(rank: int, world_size: int, overrides: list[str]) -> dict[str, Any]:
    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv

    return train.main(to_argv(compose(overrides)))


def curves(folder: Path, world_size: int, *overrides: str) -> dict[str, dict[int, float]]:
    words = [*MODEL, *overrides, f"tensorboard_dir={folder}"]
    run_distributed(train, world_size=world_size, timeout=500, init=False, overrides=words)
    logged = read_curves(folder)
    return {name: logged[name] for name in LOSSES}


EIGHT = ["expert_model_parallel_size=4", "cluster.gpus_per_node=8", "global_batch_size=16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "node_size", "overrides"),
    [(4, 1, []), (8, 2, EIGHT)],
    ids=["two nodes of one", "two nodes of two"],
)
def test_losses_under_dualpipe_with_mtp_and_bytes_in_the_log(world_size, node_size, overrides, tmp_path):
    words = ["schedule=dualpipe", *overrides]
    expected = curves(tmp_path / "alltoall", world_size, *words)
    got = curves(tmp_path / "two_hop", world_size, *words, "dispatcher=two_hop", f"moe_node_size={node_size}")
    assert list(expected["lm loss"]) == list(range(1, STEPS + 1))
    for name in LOSSES:
        assert got[name] == pytest.approx(expected[name], rel=1e-4), name
    records = [json.loads(line) for line in (tmp_path / "two_hop" / "metrics.jsonl").read_text().splitlines()]
    batch = 16 if overrides else 8
    layers = len(records[-1]["layers"])  # all but the first, and MTP
    sizes = tiny()
    wanted = expected_bytes(
        batch * 64,
        sizes["moe_router_topk"],
        2,
        sizes["moe_router_group_topk"],
        "fp32",
        hidden=sizes["hidden_size"],
        experts=sizes["num_experts"],
        ranks_per_node=node_size,
        groups=sizes["moe_router_num_groups"],
    )
    mean = {
        kind: sum(record[f"dispatch_{kind}_bytes"] for record in records) / len(records)
        for kind in ("infiniband", "nvlink")
    }
    assert mean["infiniband"] == pytest.approx(layers * wanted.infiniband, rel=0.01)
    assert mean["nvlink"] == pytest.approx(layers * wanted.nvlink, rel=0.01)


def tiny() -> dict[str, int]:
    from dsv3_megatron.conf import compose

    cfg = compose(["model=tiny", "layout=cpu_single"])
    names = (
        "moe_router_topk",
        "moe_router_group_topk",
        "moe_router_num_groups",
        "hidden_size",
        "num_experts",
    )
    return {name: cfg[name] for name in names}


@pytest.mark.slow
def test_megatrons_own_overlapped_schedule(tmp_path):
    """--overlap-moe-expert-parallel-comm, in bf16: plans of Megatron's run our dispatcher in two nodes of theirs."""
    words = ["precision=bf16", "schedule=1f1b", "pipeline_model_parallel_layout=auto", "dispatcher=two_hop"]
    words += ["moe_node_size=1", "num_virtual_stages_per_pipeline_rank=2"]
    plain = curves(tmp_path / "plain", 4, *words)
    overlapped = curves(tmp_path / "overlapped", 4, *words, "overlap_moe_expert_parallel_comm=true")
    for name in LOSSES:
        assert overlapped[name] == pytest.approx(plain[name], rel=5e-3), name
