"""Process groups of the links: made alike on all ranks, used once, capped on NCCL."""

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.harness import run_distributed


def groups_made(rank: int, world_size: int) -> dict[str, Any]:
    """Two expert-parallel groups of four on nodes of two."""
    from dsv3_megatron.dispatch import links

    halves = [dist.new_group(ranks) for ranks in ([0, 1, 2, 3], [4, 5, 6, 7])]
    mine = halves[rank // 4]
    made: list[list[int]] = []
    new_group, all_to_all = dist.new_group, dist.all_to_all_single
    used: list[Any] = []

    def note(ranks: list[int], **options: Any) -> Any:
        made.append(list(ranks))
        return new_group(ranks, **options)

    def use(*args: Any, **kwargs: Any) -> Any:
        used.append(dist.get_process_group_ranks(kwargs["group"]))
        return all_to_all(*args, **kwargs)

    with mock.patch.object(dist, "new_group", note), mock.patch.object(dist, "all_to_all_single", use):
        found = links.connect(mine, node_size=2)
        assert links.connect(mine, node_size=2) is found is links.links_of(mine)
    with pytest.raises(RuntimeError, match="connect has not been called"):
        links.links_of(dist.group.WORLD)
    return {"made": made, "used": used, "bytes": links.link_bytes(), "at": (found.num_nodes, found.node_size)}


def test_all_ranks_make_all_groups_in_one_order_and_use_theirs_once():
    ranks = run_distributed(groups_made, 8)
    rails, nodes = [[0, 2], [1, 3], [4, 6], [5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]
    for rank, found in enumerate(ranks):
        assert found["made"] == ranks[0]["made"] and sorted(found["made"]) == sorted(rails + nodes)
        assert found["used"] == [next(g for g in kind if rank in g) for kind in (rails, nodes)]
        assert found["at"] == (2, 2) and found["bytes"] == {"infiniband": 0, "nvlink": 0}


def test_all_expert_parallel_groups_from_one():
    from dsv3_megatron.dispatch.links import groups_alike

    assert groups_alike([2, 3], 4) == [[0, 1], [2, 3]]
    # Expert tensor parallelism of 2: its ranks lie beside each other.
    assert groups_alike([5, 7], 8) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    for wrong, world_size in (([1, 2], 4), ([0, 1, 2], 4), ([0, 1, 3], 6)):
        with pytest.raises(ValueError, match="no block"):
            groups_alike(wrong, world_size)


def test_ctas_are_capped_on_nccl():
    from dsv3_megatron.dispatch import links

    with (
        mock.patch.object(dist, "get_backend", return_value="nccl"),
        mock.patch.object(dist, "new_group") as new_group,
    ):
        links._new_group([0, 1], communication_sms=20)
        assert links._new_group([0], 20) is None  # alone: nothing to make
    assert new_group.call_count == 1
    assert new_group.call_args.kwargs["pg_options"].config.max_ctas == 10
