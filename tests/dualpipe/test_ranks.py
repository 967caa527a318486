"""The arithmetic of mirrored pipeline ranks, and Megatron's groups built from it."""

import pytest
import torch.distributed as dist

from dsv3_megatron.dualpipe.ranks import Placement
from tests.harness import run_distributed


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_every_pipeline_rank_holds_a_stage_and_its_complement(num_ranks: int) -> None:
    placement = Placement("dualpipe", num_ranks)
    for k in range(num_ranks):
        assert sorted((k, num_ranks - 1 - k)) == list(placement.stages(k))
        assert placement.stages(placement.mirror(k)) == placement.stages(k)


def test_dualpipev_folds_twice_as_many_stages() -> None:
    placement = Placement("dualpipev", 4)
    assert [placement.stages(r) for r in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [placement.global_rank(r, 8) for r in range(8)] == list(range(8))


@pytest.mark.parametrize("world_size, num_ranks", [(4, 2), (8, 4), (64, 16)])
def test_renumbering_is_a_permutation_that_keeps_stages_together(world_size: int, num_ranks: int) -> None:
    placement = Placement("dualpipe", num_ranks)
    columns = world_size // num_ranks
    ranks = [placement.global_rank(rank, world_size) for rank in range(world_size)]
    assert sorted(ranks) == list(range(world_size))
    for megatron_rank, rank in enumerate(ranks):
        # Megatron's V rank is the outermost digit of its numbering; ours holds the same pair of stages.
        assert placement.v_rank(rank // columns) == megatron_rank // (2 * columns)


def groups_of(rank: int, world_size: int, num_ranks: int, expert_parallel: int) -> dict[str, list[int]]:
    from megatron.core import parallel_state as mpu

    from dsv3_megatron import dualpipe

    dualpipe.install()
    dualpipe.activate("dualpipe", Placement("dualpipe", num_ranks))
    mpu.initialize_model_parallel(
        pipeline_model_parallel_size=num_ranks, expert_model_parallel_size=expert_parallel
    )
    groups = {
        "pp": mpu.get_pipeline_model_parallel_group(),
        "dp": mpu.get_data_parallel_group(),
        "ep": mpu.get_expert_model_parallel_group(),
        "expt_dp": mpu.get_expert_data_parallel_group(),
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def test_megatrons_groups_on_eight_ranks() -> None:
    groups = run_distributed(groups_of, world_size=8, num_ranks=4, expert_parallel=2)
    # Two ranks beside each other on each of four pipeline ranks: 0 1 | 2 3 | 4 5 | 6 7; 0 and 3 hold the same stages.
    assert groups[0] == {"pp": [0, 2], "dp": [0, 1, 6, 7], "ep": [0, 1], "expt_dp": [0, 6]}
    assert groups[7] == {"pp": [7, 5], "dp": [0, 1, 6, 7], "ep": [6, 7], "expt_dp": [1, 7]}
    assert groups[5] == {"pp": [7, 5], "dp": [2, 3, 4, 5], "ep": [4, 5], "expt_dp": [3, 5]}


def refused(rank: int, world_size: int, **sizes: int) -> str:
    from megatron.core import parallel_state as mpu

    from dsv3_megatron import dualpipe

    dualpipe.install()
    dualpipe.activate("dualpipe", Placement("dualpipe", 2))
    with pytest.raises(ValueError) as error:
        mpu.initialize_model_parallel(**sizes)
    return str(error.value)


@pytest.mark.parametrize(
    "sizes, named",
    [
        (
            {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4},
            "--expert-model-parallel-size 4",
        ),
        ({"pipeline_model_parallel_size": 4}, "--pipeline-model-parallel-size 4"),
        ({"pipeline_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"}, "--use-tp-pp-dp-mapping"),
    ],
)
def test_what_cannot_be_mirrored_is_refused(sizes, named) -> None:
    for message in run_distributed(refused, world_size=4, **sizes):
        assert named in message
