"""The arithmetic of mirrored pipeline ranks, and Megatron's groups built from it."""

from unittest import mock

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
    assert placement.pipelines(8) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_rank_and_its_mirror_are_neighbouring_blocks() -> None:
    """So that Megatron's own numbering, with half as many pipeline ranks, needs no change."""
    placement = Placement("dualpipe", 6)
    assert [placement.pipeline_rank(rank, 12) for rank in range(12)] == [0, 0, 5, 5, 1, 1, 4, 4, 2, 2, 3, 3]
    assert placement.pipelines(12) == [[0, 4, 8, 10, 6, 2], [1, 5, 9, 11, 7, 3]]


@pytest.mark.parametrize("world_size, num_ranks", [(4, 2), (8, 4), (64, 16)])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_every_rank_is_once_in_a_pipeline_at_its_place(
    schedule: str, world_size: int, num_ranks: int
) -> None:
    placement = Placement(schedule, num_ranks)
    pipelines = placement.pipelines(world_size)
    assert sorted(rank for pipeline in pipelines for rank in pipeline) == list(range(world_size))
    columns = world_size // num_ranks
    for pipeline in pipelines:
        for k, rank in enumerate(pipeline):
            assert placement.pipeline_rank(rank, world_size) == k
            assert placement.pipeline_ranks(rank, world_size) == pipeline
            # Megatron's V rank is the outermost digit of its numbering; ours holds the same pair of stages.
            copies = 2 if placement.mirrored else 1
            assert placement.v_rank(k) == rank // (copies * columns)


def groups_of(rank: int, world_size: int, num_ranks: int, expert_parallel: int) -> dict[str, list[int]]:
    from megatron.core import parallel_state as mpu

    from dsv3_megatron import dualpipe

    dualpipe.install()
    dualpipe.activate("dualpipe", Placement("dualpipe", num_ranks))
    new_group = dist.new_group

    def of_torch_2_11(
        ranks=None,
        timeout=None,
        backend=None,
        pg_options=None,
        use_local_synchronization=False,
        group_desc=None,
        device_id=None,
    ):
        local = use_local_synchronization
        return new_group(
            ranks, timeout, backend, pg_options, use_local_synchronization=local, group_desc=group_desc
        )

    with mock.patch.object(dist, "new_group", of_torch_2_11):
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
    """By a `new_group` as torch 2.11 has it, which sorts a group's ranks."""
    groups = run_distributed(groups_of, world_size=8, num_ranks=4, expert_parallel=2)
    # Two ranks beside each other on each of the pipeline ranks 0, 3, 1, 2: 0 1 | 2 3 | 4 5 | 6 7; 0 and 3 hold the same
    # stages.
    assert groups[0] == {"pp": [0, 4], "dp": [0, 1, 2, 3], "ep": [0, 1], "expt_dp": [0, 2]}
    assert groups[7] == {"pp": [3, 7], "dp": [4, 5, 6, 7], "ep": [6, 7], "expt_dp": [5, 7]}
    assert groups[2] == {"pp": [2, 6], "dp": [0, 1, 2, 3], "ep": [2, 3], "expt_dp": [0, 2]}


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
