"""FP8 on both hops: an expert gets bit for bit what it gets from the FP8 all-to-all, and so does its gradient."""

from typing import Any

import torch

from dsv3_megatron.fp8.dispatch import decode_message, encode_message
from tests.dispatch.test_layer import HIDDEN, problem, upstream
from tests.harness import run_distributed

EXPERTS, RANKS = 16, 4


def through(rank: int, world_size: int, dispatcher: str) -> dict[str, Any]:
    """What arrives at this rank's experts, forward and backward, and what comes back, in bf16 with an FP8 recipe."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from dsv3_megatron import dispatch
    from dsv3_megatron.dispatch.dispatcher import TwoHopTokenDispatcher
    from dsv3_megatron.dispatch.links import connect, link_bytes
    from dsv3_megatron.fp8.dispatch import FP8AlltoAllTokenDispatcher
    from tests.specs.models import micro_config

    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    dispatch.activate(node_size=2, num_chunks=3)
    fields = {"num_moe_experts": EXPERTS, "moe_router_topk": 4, "expert_model_parallel_size": world_size}
    config = micro_config(**fields, fp8_recipe="dsv3").transformer
    groups = ProcessGroupCollection.use_mpu_process_groups()
    connect(groups.ep, 2)
    held = list(range(rank * 4, rank * 4 + 4))
    kinds: dict[str, Any] = {"two_hop": TwoHopTokenDispatcher, "alltoall": FP8AlltoAllTokenDispatcher}
    moves = kinds[dispatcher](4, held, config, groups)
    tokens, routing_map, probs = problem(rank, "uneven", torch.bfloat16, EXPERTS)
    tokens.requires_grad_()
    before = link_bytes()
    x, p = moves.token_dispatch(*moves.dispatch_preprocess(tokens, routing_map, probs.float()))
    sent = {kind: link_bytes()[kind] - before[kind] for kind in before}
    x, _, p = moves.dispatch_postprocess(x, p)
    y = (x * p.unsqueeze(1)).to(x.dtype)
    y.retain_grad()
    x.retain_grad()
    output = moves.combine_postprocess(moves.token_combine(moves.combine_preprocess(y)))
    output.backward(upstream(rank, output.shape, torch.bfloat16) * 1e-6)
    return {
        "x": x.detach(),
        "p": p.detach(),
        "dy": y.grad,
        "dx": x.grad,
        "out": output.detach(),
        "grad": tokens.grad,
        "bytes": sent,
    }


def test_experts_and_gradients_get_the_same_bytes_as_from_alltoall():
    ours, theirs = (run_distributed(through, RANKS, dispatcher=name) for name in ("two_hop", "alltoall"))
    for got, wanted in zip(ours, theirs, strict=True):
        for name in ("x", "p", "dy", "dx"):
            assert torch.equal(got[name], wanted[name]), name
        # bf16 back; here a node's part is rounded once, there every expert's.
        for name in ("out", "grad"):
            size = float(wanted[name].abs().max()) if wanted[name].numel() else 1.0
            torch.testing.assert_close(got[name], wanted[name], rtol=0.02, atol=0.02 * size)


def test_what_arrives_is_e4m3():
    ours = run_distributed(through, RANKS, dispatcher="two_hop")
    for rank in ours:
        for name, eps in (("x", 1e-4), ("dy", 0.0)):
            again = decode_message(encode_message(rank[name], eps), HIDDEN).bfloat16()
            assert torch.equal(again, rank[name]), name
    tokens = torch.cat([problem(rank, "uneven", torch.bfloat16, EXPERTS)[0] for rank in range(RANKS)])
    assert not torch.equal(
        decode_message(encode_message(tokens.view(-1, HIDDEN), 1e-4), HIDDEN).bfloat16(),
        tokens.view(-1, HIDDEN),
    )
    # A row: 16 numbers and a scale in a byte each, four weights, a bit for each of a node's eight experts.
    rows = sum(
        int(problem(rank, "uneven", torch.bfloat16, EXPERTS)[1].view(-1, 2, 8).any(2)[:, 1 - rank // 2].sum())
        for rank in range(RANKS)
    )
    assert sum(rank["bytes"]["infiniband"] for rank in ours) == rows * (HIDDEN + 1 + 4 * 4 + 1)
