"""The group limit held against NVLink domains: what breaks it is refused, and nothing else."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.refusals import check
from dsv3_megatron.arguments.refusals.layout import domains_of_a_token
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.conf import compose
from tests.arguments.lines import MICRO

V3 = "--moe-router-num-groups 8 --moe-router-group-topk 4"


def by_enumeration(
    num_groups: int, group_topk: int, expert_ranks: int, ranks_per_expert: int, domain: int, world_size: int
) -> int:
    """Every choice of groups in every block of ranks; a group lies on each rank that holds a part of it."""
    block, most = expert_ranks * ranks_per_expert, 0
    for start in range(0, world_size, block):
        # Parts so small that neither a rank nor a group is divided.
        parts: list[list[int]] = [[] for _ in range(num_groups)]
        for part in range(block * num_groups):
            parts[part // block].append((start + part // num_groups) // domain)
        for chosen in itertools.combinations(parts, group_topk):
            most = max(most, len(set(itertools.chain(*chosen))))
    return most


@settings(max_examples=150)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(1, 2),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_most_domains(
    num_groups: int, group_topk: int, ranks: int, per_expert: int, domain: int, blocks: int
) -> None:
    group_topk = min(group_topk, num_groups)
    world_size = ranks * per_expert * blocks
    counted = domains_of_a_token(
        num_groups=num_groups,
        group_topk=group_topk,
        expert_ranks=ranks,
        ranks_per_expert=per_expert,
        domain=domain,
        world_size=world_size,
    )
    assert counted == by_enumeration(num_groups, group_topk, ranks, per_expert, domain, world_size)


def found(words: str, around: Surroundings) -> list[str]:
    args = megatron_parser().parse_args([*MICRO, *words.split()])
    try:
        check(args, around)
    except RefusedArgument as error:
        return [line for line in str(error).splitlines() if "NVLink" in line]
    return []


@pytest.mark.parametrize(
    ("experts", "words", "world_size", "ranks_per_node", "refused"),
    [
        # DeepSeek-V3: 8 groups, 4 of them, 64 ranks on 8 nodes; twice the ranks put a group on two nodes.
        (
            256,
            f"{V3} --expert-model-parallel-size 64",
            2048,
            8,
            "",
        ),
        (
            256,
            f"{V3} --expert-model-parallel-size 128",
            2048,
            8,
            "8",
        ),
        # GB200 NVL72: trays of four, NVLink over the rack; without saying so the tray counts.
        (
            256,
            f"{V3} --expert-model-parallel-size 64 --nvlink-domain-size 72",
            256,
            4,
            "",
        ),
        (
            256,
            f"{V3} --expert-model-parallel-size 64",
            256,
            4,
            "8",
        ),
        # No limit binds: one group (Moonlight, Kimi K2), or all groups may be chosen.
        (
            64,
            "--moe-router-num-groups 1 --moe-router-group-topk 1 --expert-model-parallel-size 32",
            64,
            8,
            "",
        ),
        (
            64,
            "--moe-router-num-groups 4 --moe-router-group-topk 4 --expert-model-parallel-size 64",
            64,
            4,
            "",
        ),
        # Groups across nodes, but fewer nodes than groups that may be chosen.
        (
            96,
            "--moe-router-num-groups 3 --moe-router-group-topk 2 --expert-model-parallel-size 16",
            64,
            8,
            "",
        ),
        # A domain can be smaller than a machine.
        (
            64,
            "--moe-router-num-groups 4 --moe-router-group-topk 2 --expert-model-parallel-size 8 --nvlink-domain-size 1",
            8,
            8,
            "4",
        ),
    ],
)
def test_what_is_refused(
    experts: int, words: str, world_size: int, ranks_per_node: int, refused: str
) -> None:
    words = f"--num-experts {experts} --moe-router-topk 2 --global-batch-size {world_size} {words}"
    messages = found(words, Surroundings(world_size=world_size, ranks_per_node=ranks_per_node))
    if not refused:
        assert messages == []
    else:
        assert len(messages) == 1 and f"({refused} domains of " in messages[0]
        assert (
            messages[0].startswith("--expert-model-parallel-size") and "--nvlink-domain-size" in messages[0]
        )


def test_the_racks_configuration_says_so() -> None:
    assert compose(["cluster=gb200_256", "layout=pp16_ep16", "model=v3_671b"]).nvlink_domain_size == 72
