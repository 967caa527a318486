"""One dispatch and combine against plain arithmetic in one process: outputs and every gradient."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.dispatch.volume import Layout, Row, counted_bytes
from tests.harness import run_distributed
from tests.parallel.common import relative_difference

HIDDEN, EXPERTS, TOPK = 16, 16, 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def problem(rank: int, kind: str, dtype: torch.dtype, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [T, 1, h], routing_map [T, E], probs [T, E] of one rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens = {"uneven": 3 * rank % 11, "nothing": 0}.get(kind, 9)
    scores = torch.rand(num_tokens, experts, generator=generator)
    if kind == "one node":
        scores[:, : experts // 2] -= 10  # the last experts are on the last node
    if kind == "empty experts":
        scores[:, 1::2] -= 10
    top = scores.topk(TOPK, 1).indices
    routing_map = torch.zeros(num_tokens, experts, dtype=torch.bool).scatter_(1, top, True)
    probs = torch.rand(num_tokens, experts, generator=generator).to(dtype) * routing_map
    return torch.randn(num_tokens, 1, HIDDEN, generator=generator).to(dtype), routing_map, probs


def weights(dtype: torch.dtype, experts: int) -> Tensor:
    return torch.randn(experts, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(7)).to(dtype)


def upstream(rank: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(200 + rank)).to(dtype)


def expert(weight: Tensor, x: Tensor, p: Tensor) -> Tensor:
    return torch.tanh(x @ weight) * p.unsqueeze(1)


def by_hand(rank: int, kind: str, dtype: torch.dtype, experts: int) -> dict[str, Tensor]:
    """A rank's outputs and gradients, and its part of the experts' gradients, without dispatch."""
    tokens, routing_map, probs = problem(rank, kind, dtype, experts)
    tokens, probs = tokens.requires_grad_(), probs.requires_grad_()
    weight = weights(dtype, experts).requires_grad_()
    flat = tokens.view(-1, HIDDEN)
    output = torch.zeros_like(flat)
    for e in range(experts):
        mine = routing_map[:, e].nonzero()[:, 0]
        output = output.index_add(0, mine, expert(weight[e], flat[mine], probs[mine, e]))
    output = output.view_as(tokens)
    output.backward(upstream(rank, output.shape, dtype))
    grads = [
        torch.zeros_like(x) if x.grad is None else x.grad.masked_fill(~m, 0)
        for x, m in (
            (tokens, torch.ones_like(tokens, dtype=torch.bool)),
            (probs, routing_map),
            (weight, torch.ones_like(weight, dtype=torch.bool)),
        )
    ]
    return {"output": output.detach(), "tokens": grads[0], "probs": grads[1], "weight": grads[2]}


def by_dispatch(
    rank: int, world_size: int, kind: str, dtype: torch.dtype, dispatcher: str, **layout: Any
) -> dict[str, Any]:
    """The same through a dispatcher, each rank with its own tokens."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from dsv3_megatron.dispatch.dispatcher import TwoHopTokenDispatcher
    from dsv3_megatron.dispatch.links import connect, link_bytes

    config = start(world_size, **layout)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    connect(groups.ep, layout["node_size"])
    per_rank = config.num_moe_experts // groups.ep.size()
    first = groups.ep.rank() * per_rank
    kinds: dict[str, Any] = {"two_hop": TwoHopTokenDispatcher, "alltoall": MoEAlltoAllTokenDispatcher}
    if (
        "pad" in layout
    ):  # as Megatron's padding for quantisation: some tokens get more experts, with no weight
        config.moe_router_padding_for_quantization = True
        from dsv3_megatron.dispatch import dispatcher as module

        module.get_align_size_for_quantization = lambda _: layout["pad"]
    moves = kinds[dispatcher](per_rank, list(range(first, first + per_rank)), config, groups)
    placed = layout.get("placed")
    if placed is not None:
        moves.expert_of_slot = torch.tensor(placed)
    here = torch.arange(config.num_moe_experts) if placed is None else torch.tensor(placed)
    held = weights(dtype, config.num_moe_experts)[here[first : first + per_rank]].clone().requires_grad_()

    tokens, routing_map, probs = problem(rank, kind, dtype, config.num_moe_experts)
    tokens, probs = tokens.requires_grad_(), probs.requires_grad_()
    before = link_bytes()
    x, p = moves.dispatch_preprocess(tokens, routing_map.clone(), probs)
    x, p = moves.token_dispatch(x, p)
    x, counts, p = moves.dispatch_postprocess(x, p)
    splits = torch.as_tensor(counts).tolist()
    pieces = zip(held, x.split(splits), p.split(splits), strict=True)
    y = torch.cat([expert(w, *piece) for w, *piece in pieces])
    y = moves.token_combine(moves.combine_preprocess(y))
    output = moves.combine_postprocess(y)
    output.backward(upstream(rank, output.shape, dtype))
    sent = {kind: link_bytes()[kind] - before[kind] for kind in before}
    masked = torch.zeros_like(probs) if probs.grad is None else probs.grad.masked_fill(~routing_map, 0)
    weight = {int(e): g for e, g in zip(here[first : first + per_rank], held.grad, strict=True)}
    inputs = {int(e): piece.detach() for e, piece in zip(here[first:], x.split(splits), strict=False)}
    return {
        "output": output.detach(),
        "tokens": tokens.grad,
        "probs": masked,
        "weight": weight,
        "inputs": inputs,
        "bytes": sent,
        "counts": [int(m) for m in splits],
    }


def start(
    world_size: int, node_size: int, chunks: int = 3, tp: int = 1, experts: int = EXPERTS, **_: Any
) -> Any:
    """Process groups, unless an earlier case has made them, and a configuration."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from dsv3_megatron import dispatch
    from tests.specs.models import micro_config

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=world_size // tp, expert_tensor_parallel_size=tp
        )
    model_parallel_cuda_manual_seed(1)
    dispatch.activate(node_size, chunks)
    fields = {
        "num_moe_experts": experts,
        "moe_router_topk": TOPK,
        "expert_model_parallel_size": world_size // tp,
    }
    return micro_config(**fields, expert_tensor_parallel_size=tp).transformer


FP32, FP64 = torch.float32, torch.float64
PLACED = (5, 2, 7, 0, 1, 6, 3, 4, 12, 8, 15, 14, 9, 13, 11, 10)
CHUNKS = (1, 4, 30)  # also more than there are tokens
# What the default tests need of 2 nodes × 2, all in one go: processes and their groups are what takes time.
TOGETHER = [
    *(
        {"kind": kind, "dtype": dtype, "dispatcher": dispatcher}
        for dtype, kind in ((FP64, "uneven"), (FP64, "one node"), (FP32, "empty experts"))
        for dispatcher in ("two_hop", "alltoall")
    ),
    *({"kind": "uneven", "dtype": FP32, "dispatcher": "two_hop", "chunks": c} for c in (3, *CHUNKS)),
    {"kind": "uneven", "dtype": FP32, "dispatcher": "two_hop", "chunks": 3, "placed": PLACED},
    {"kind": "even", "dtype": FP64, "dispatcher": "two_hop", "pad": 4},
]


def in_turn(rank: int, world_size: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [by_dispatch(rank, world_size, node_size=2, **job) for job in jobs]


@functools.cache
def together() -> list[list[dict[str, Any]]]:
    """Of each of these jobs the results by rank."""
    return list(zip(*run_distributed(in_turn, 4, timeout=240, jobs=TOGETHER), strict=True))


def on_two_nodes_of_two(**job: Any) -> Any:
    """Results by rank."""
    if job in TOGETHER:
        return together()[TOGETHER.index(job)]
    return run_distributed(by_dispatch, 4, node_size=2, **job)


def assert_equal_to_one_process(
    ranks: list[dict[str, Any]], kind: str, dtype: torch.dtype, experts: int
) -> None:
    total = torch.zeros(experts, HIDDEN, HIDDEN, dtype=dtype)
    for rank, result in enumerate(ranks):
        wanted = by_hand(rank, kind, dtype, experts)
        total += wanted["weight"]
        for name in ("output", "tokens", "probs"):
            assert relative_difference(result[name], wanted[name]) <= TOLERANCE[dtype], (rank, name)
    for result in ranks:
        for number, grad in result["weight"].items():
            assert relative_difference(grad, total[number]) <= TOLERANCE[dtype], number


KINDS = ["even", "uneven", "one node", "empty experts", "nothing"]
OFTEN = [(job["dtype"], job["kind"]) for job in TOGETHER if job["dispatcher"] == "alltoall"]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        pytest.param(*case, marks=[] if case in OFTEN else [pytest.mark.slow])
        for case in itertools.product(TOLERANCE, KINDS)
    ],
)
def test_two_nodes_of_two(kind, dtype):
    ranks = on_two_nodes_of_two(kind=kind, dtype=dtype, dispatcher="two_hop")
    assert_equal_to_one_process(ranks, kind, dtype, EXPERTS)
    theirs = on_two_nodes_of_two(kind=kind, dtype=dtype, dispatcher="alltoall")
    for got, expected in zip(ranks, theirs, strict=True):
        for name in ("output", "tokens", "probs"):
            assert relative_difference(got[name], expected[name]) <= TOLERANCE[dtype]
        # An expert sees the same batch, row by row.
        assert all(torch.equal(got["inputs"][e], expected["inputs"][e]) for e in expected["inputs"])
    sources = [problem(rank, kind, dtype, EXPERTS)[1] for rank in range(4)]
    row = Row(HIDDEN, str(dtype).replace("torch.float", "fp"), dtype.itemsize)
    wanted = [counted_bytes(mask, r, Layout(EXPERTS, 2, 2), TOPK, row).step for r, mask in enumerate(sources)]
    for link, name in enumerate(("infiniband", "nvlink")):
        assert sum(rank["bytes"][name] for rank in ranks) == pytest.approx(sum(w[link] for w in wanted))


SHAPES = [
    (8, {"node_size": 4}),
    (8, {"node_size": 2, "chunks": 10}),
    (8, {"node_size": 8}),
    (4, {"node_size": 1, "chunks": 1}),
    (8, {"node_size": 4, "tp": 2}),
    (4, {"node_size": 2, "experts": 4}),
]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [pytest.param(*shape, marks=[pytest.mark.slow] if i % 4 else []) for i, shape in enumerate(SHAPES)],
)
def test_other_shapes(world_size, layout):
    """2 × 4, 4 × 2, one node, one rank per node, expert tensor parallelism, one expert per rank."""
    dtype, experts = torch.float64, layout.get("experts", EXPERTS)
    ranks = run_distributed(
        by_dispatch, world_size, kind="uneven", dtype=dtype, dispatcher="two_hop", **layout
    )
    if "tp" not in layout:
        assert_equal_to_one_process(ranks, "uneven", dtype, experts)
        return
    # Each expert tensor parallel rank holds the whole expert here, so its outputs and gradients come twice.
    for rank, result in enumerate(ranks):
        wanted = by_hand(rank, "uneven", dtype, experts)
        for name in ("output", "tokens", "probs"):
            assert relative_difference(result[name], 2 * wanted[name]) <= TOLERANCE[dtype], (rank, name)


def test_experts_that_are_not_at_home_change_no_bit():
    """Inside their nodes; in fp32, where an order of addition would be seen."""
    job: dict[str, Any] = {"kind": "uneven", "dtype": FP32, "dispatcher": "two_hop", "chunks": 3}
    home, moved = on_two_nodes_of_two(**job), on_two_nodes_of_two(**job, placed=PLACED)
    for name in ("output", "tokens", "probs"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(home, moved, strict=True)), name
    for name in ("weight", "inputs"):
        at_home, elsewhere = ({e: x for rank in run for e, x in rank[name].items()} for run in (home, moved))
        assert at_home.keys() == elsewhere.keys()
        assert all(torch.equal(at_home[e], elsewhere[e]) for e in at_home)


def test_the_order_of_sums_does_not_depend_on_chunks_or_runs():
    job: dict[str, Any] = {"kind": "uneven", "dtype": FP32, "dispatcher": "two_hop"}
    first = on_two_nodes_of_two(**job, chunks=1)
    again = run_distributed(by_dispatch, 4, node_size=2, **job, chunks=1)  # in processes of its own
    for other in (again, *(on_two_nodes_of_two(**job, chunks=chunks) for chunks in CHUNKS)):
        for name in ("output", "tokens", "probs"):
            assert all(torch.equal(a[name], b[name]) for a, b in zip(first, other, strict=True))


def test_padding_for_quantisation():
    """Every rank's tokens for an expert are a multiple of four; what was added has no weight and changes nothing."""
    ranks = on_two_nodes_of_two(kind="even", dtype=FP64, dispatcher="two_hop", pad=4)
    assert all(count % 4 == 0 for rank in ranks for count in rank["counts"])
    assert sum(sum(rank["counts"]) for rank in ranks) > 4 * 9 * TOPK
    assert_equal_to_one_process(ranks, "even", FP64, EXPERTS)
