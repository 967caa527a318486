"""Dry runs: groups and modules of any rank, and totals that agree with published and independent figures."""

import json
import subprocess
import sys
import time

import pytest

from dsv3_megatron.conf import compose
from dsv3_megatron.conf.check import world_size
from dsv3_megatron.dryrun import FakeWorld, build_rank, weights_of
from dsv3_megatron.dryrun.count import Weight, kind_of, total
from dsv3_megatron.errors import RefusedArgument

V3 = ["model=v3_671b", "layout=pp16_ep64"]  # under DualPipe
V3_1F1B = [*V3, "schedule=1f1b"]


@pytest.fixture(scope="module")
def last_rank():
    started = time.monotonic()
    report = build_rank(compose(V3_1F1B), 2047)
    return report, time.monotonic() - started


def test_published_totals(last_rank) -> None:
    """deepseek-v3.md §1: 671.03B, and 11.6B more with MTP."""
    report, _ = last_rank
    assert round(report.total_parameters_without_mtp / 1e9, 2) == 671.03
    assert round(report.total_parameters / 1e9, 2) == 682.64


def test_total_by_hand(last_rank) -> None:
    """The sizes of the report multiplied out, module by module, apart from any module of ours."""
    hidden, heads = 7168, 128
    attention = (
        hidden * 1536
        + 1536
        + 1536 * heads * (128 + 64)  # queries
        + hidden * (512 + 64)
        + 512
        + 512 * heads * (128 + 128)  # keys and values
        + heads * 128 * hidden
    )
    expert = 3 * hidden * 2048
    dense = attention + 3 * hidden * 18432 + 2 * hidden
    moe = attention + 257 * expert + 256 * hidden + 2 * hidden
    without_mtp = 3 * dense + 58 * moe + 2 * 129280 * hidden + hidden
    report, _ = last_rank
    assert report.total_parameters_without_mtp == without_mtp
    assert report.total_parameters == without_mtp + moe + 2 * hidden * hidden + 3 * hidden


def test_last_rank(last_rank) -> None:
    report, _ = last_rank
    assert (report.world_size, report.rank, report.stages) == (2048, 2047, [15])
    assert (report.layers, report.mtp_layers) == ([60], [61])
    assert round(report.num_parameters / 1e9, 2) == 2.77
    assert report.groups == {"dp": 128, "expt_dp": 2, "ep": 64, "pp": 16, "tp": 1, "cp": 1, "etp": 1}
    assert sum(report.by_kind.values()) == report.num_parameters


def test_a_671b_rank_takes_less_than_a_minute(last_rank) -> None:
    assert last_rank[1] < 60


@pytest.mark.parametrize(
    "rank, stages, layers",
    [
        # A pipeline rank and its mirror are neighbouring blocks of 128 ranks.
        (0, [0, 15], [0, 1, 2, 3, 60]),
        (128 + 5, [0, 15], [0, 1, 2, 3, 60]),
        pytest.param(14 * 128, [7, 8], list(range(28, 36)), marks=pytest.mark.slow),
        (2047, [7, 8], list(range(28, 36))),
    ],
)
def test_dualpipe_holds_two_stages_and_twice_the_replicas(rank, stages, layers, last_rank) -> None:
    report = build_rank(compose(V3), rank)
    assert (report.stages, report.layers) == (stages, layers)
    own = {"dp": 128, "expt_dp": 2, "ep": 64, "pp": 16, "tp": 1, "cp": 1, "etp": 1}
    assert report.groups == own | {"mirror_dp": 256, "mirror_expt_dp": 4}
    assert report.total_parameters == last_rank[0].total_parameters
    if stages == [0, 15]:
        # MTP uses the embedding of the first stage: the rank holds one.
        assert report.by_kind["embedding"] == 129280 * 7168


def test_dualpipev_holds_two_stages_and_no_mirror(last_rank) -> None:
    report = build_rank(compose([*V3, "schedule=dualpipev"]), 15 * 128)
    assert (report.stages, report.layers) == ([15, 16], [30, 31, 32, 33])
    assert report.groups == last_rank[0].groups
    assert report.total_parameters == last_rank[0].total_parameters


def test_first_rank() -> None:
    with FakeWorld.of(compose(V3_1F1B), 0) as world:
        (chunk,) = world.build_chunks()
        weights = weights_of(chunk)
        assert all(parameter.device.type == "meta" for parameter in chunk.parameters())
    assert sorted({weight.layer for weight in weights if weight.layer is not None}) == [0, 1, 2, 3]
    assert round(sum(weight.local_size for weight in weights) / 1e9, 2) == 3.09


@pytest.mark.parametrize(
    "layout", ["ep32_pp16", pytest.param("pp16_ep16", marks=pytest.mark.slow), "pp8_ep8"]
)
def test_the_total_does_not_depend_on_the_layout(layout: str, last_rank) -> None:
    report = build_rank(compose(["model=v3_671b", f"layout={layout}"]), 0)
    assert report.total_parameters == last_rank[0].total_parameters
    assert report.groups["dp"] * report.groups["pp"] == report.world_size
    assert report.groups["expt_dp"] * report.groups["ep"] == report.groups["dp"]


SMALL = ["model=micro"]


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("cpu_single", []),
        pytest.param("cpu_pp4_ep2", [], marks=pytest.mark.slow),
        ("cpu_pp2_ep2", ["num_virtual_stages_per_pipeline_rank=2"]),
        ("cpu_pp2_ep2", ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
        ("cpu_pp2_ep2", ["context_parallel_size=2", "cp_comm_type=all_gather"]),
    ],
)
def test_ranks_together_hold_the_model(layout: str, overrides: list[str]) -> None:
    """Every rank built as itself (no stage built for another): distinct tensors and shards add up to the
    totals.
    """
    cfg = compose([*SMALL, f"layout={layout}", *overrides])
    shards = {}
    for rank in range(world_size(cfg)):
        with FakeWorld.of(cfg, rank) as world:
            place = world.groups.tp.rank(), world.groups.expt_tp.rank()
            for chunk in world.build_chunks():
                for weight in weights_of(chunk):
                    split = weight.shape != weight.full_shape
                    which = place[weight.kind == "routed_experts"] if split else 0
                    shards[weight.name, which] = weight
    report = build_rank(cfg, 0)
    assert sum(w.local_size for w in shards.values()) == report.total_parameters
    without = sum(w.local_size for w in shards.values() if not w.mtp)
    assert without == report.total_parameters_without_mtp


def test_stages_built_for_another_are_what_that_rank_builds() -> None:
    """build_chunks(k) on rank 0 equals build_chunks() on the rank that stands at k, name by name."""
    cfg = compose([*SMALL, "layout=cpu_pp4_ep2"])
    with FakeWorld.of(cfg, 0) as world:
        by_proxy = [[weights_of(c) for c in world.build_chunks(stage)] for stage in range(4)]
    for rank in (0, 2, 4, 6):  # expert rank 0 of each stage
        with FakeWorld.of(cfg, rank) as world:
            assert world.group_sizes()["ep"] == 2
            assert [weights_of(c) for c in world.build_chunks()] == by_proxy[world.pipeline_rank]


def test_expert_tensor_parallel_group() -> None:
    tensor_parallel = ["tensor_model_parallel_size=2", "sequence_parallel=true"]
    cfg = compose([*SMALL, "layout=cpu_ep4", *tensor_parallel, "cluster.gpus_per_node=8"])
    assert build_rank(cfg, 7).groups == {"dp": 4, "expt_dp": 1, "ep": 4, "pp": 1, "tp": 2, "cp": 1, "etp": 2}


def test_a_tensor_on_two_stages_counts_once() -> None:
    def weight(name: str, mtp: bool = False, copies: int = 1) -> Weight:
        return Weight(name, (2, 3), (2, 3), "norm", None, mtp, copies)

    weights = [weight("a"), weight("a"), weight("b", copies=4), weight("c", mtp=True)]
    assert total(weights) == 6 + 24 + 6
    assert total(weights, mtp=False) == 6 + 24


def test_an_unknown_parameter_is_not_overlooked() -> None:
    with pytest.raises(KeyError, match="no known kind"):
        kind_of("decoder.layers.0.surprise.weight")


@pytest.mark.parametrize(
    ("overrides", "rank", "message"),
    [
        ([], 4, "rank=4: the job has 4 ranks, 0 to 3"),
        ([], -1, "rank=-1"),
        (["pipeline_model_parallel_layout=Ettt|mL"], 0, "--num-layers 4"),
        (["weight_decay=0.3"], 0, "weight_decay"),
    ],
)
def test_what_cannot_be_built_is_refused(overrides: list[str], rank: int, message: str) -> None:
    with pytest.raises(RefusedArgument, match=message):
        build_rank(compose([*SMALL, *overrides]), rank)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv3_megatron.dryrun", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_prints_one_json_line_last() -> None:
    done = run("model=micro", "layout=cpu_pp2_ep2", "rank=3", "output=json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1
    assert (report["world_size"], report["rank"], report["stages"], report["layers"]) == (4, 3, [1], [2, 3])
    assert report["groups"]["dp"] == 2 and report["groups"]["expt_dp"] == 1
    assert "building pipeline rank 2 of 2" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rank=x"], "rank=x: a rank is a whole number"),
        (["output=yaml"], "output=yaml: use output=table or output=json"),
        (["layout=pp16_ep46"], "did you mean 'pp16_ep64'?"),
    ],
)
def test_command_refuses_in_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv3_megatron.dryrun.__main__ import main

    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
