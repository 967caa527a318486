"""Bytes that really cross the links, at V3's routing and sizes: as expected within 1%, and half of alltoall's."""

from typing import Any

import pytest
import torch

from dsv3_megatron.dispatch import expected_bytes
from tests.harness import run_distributed

TOKENS, HIDDEN, NODES = 192, 7168, 8
V3 = {
    "hidden_size": HIDDEN,
    "num_moe_experts": 256,
    "moe_router_topk": 8,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
}


def one_layer(rank: int, world_size: int, dispatcher: str, fp8: bool) -> dict[str, Any]:
    """Route, dispatch, combine and backward in bf16; eight nodes of one rank. Bytes sent to other nodes."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from dsv3_megatron import dispatch
    from dsv3_megatron.dispatch.dispatcher import TwoHopTokenDispatcher
    from dsv3_megatron.dispatch.links import connect, link_bytes
    from dsv3_megatron.fp8.dispatch import FP8AlltoAllTokenDispatcher
    from dsv3_megatron.specs.router import DSV3Router
    from tests.specs.models import micro_config

    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    dispatch.activate(node_size=1)
    fields: dict[str, Any] = {
        **V3,
        "expert_model_parallel_size": world_size,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    }
    if fp8:
        fields["fp8_recipe"] = "dsv3"
    config = micro_config(**fields).transformer
    groups = ProcessGroupCollection.use_mpu_process_groups()
    connect(groups.ep, 1)
    kinds: dict[str, Any] = {
        "two_hop": TwoHopTokenDispatcher,
        "alltoall": FP8AlltoAllTokenDispatcher if fp8 else MoEAlltoAllTokenDispatcher,
    }
    moves = kinds[dispatcher](32, list(range(rank * 32, rank * 32 + 32)), config, groups)
    router = DSV3Router(config, groups)
    torch.manual_seed(100 + rank)
    with torch.no_grad():
        router.weight.copy_(
            torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.01
        )
    tokens = torch.randn(TOKENS, 1, HIDDEN).bfloat16().requires_grad_()

    counted = [0]
    original = dist.all_to_all_single

    def count(
        output: Any, message: torch.Tensor, out: Any = None, into: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        into = kwargs.get("input_split_sizes", into)
        row = message[0].numel() * message.dtype.itemsize if len(message) else 0
        counted[0] += (sum(into) - into[rank]) * row
        return (
            original(output, message, out, **kwargs)
            if into is None
            else original(
                output,
                message,
                kwargs.pop("output_split_sizes", out),
                kwargs.pop("input_split_sizes", into),
                **kwargs,
            )
        )

    before = link_bytes()
    dist.all_to_all_single = count
    try:
        probs, routing_map = router(tokens)
        x, p = moves.token_dispatch(*moves.dispatch_preprocess(tokens, routing_map, probs))
        x, _, p = moves.dispatch_postprocess(x, p)
        y = (x * p.unsqueeze(1)).to(x.dtype)
        output = moves.combine_postprocess(moves.token_combine(moves.combine_preprocess(y)))
        output.backward(torch.randn_like(output))
    finally:
        dist.all_to_all_single = original
    own = {kind: link_bytes()[kind] - before[kind] for kind in before}
    return {"wire": counted[0], "own": own}


@pytest.mark.parametrize(
    "fp8", [pytest.param(False, id="bf16", marks=pytest.mark.slow), pytest.param(True, id="fp8")]
)
def test_v3s_routing_on_eight_nodes(fp8):
    wire = {}
    for dispatcher in ("two_hop", "alltoall"):
        ranks = run_distributed(one_layer, NODES, timeout=300, dispatcher=dispatcher, fp8=fp8)
        wire[dispatcher] = sum(rank["wire"] for rank in ranks)
        if dispatcher == "two_hop":  # the dispatcher's own count is that of the wire
            assert sum(rank["own"]["infiniband"] for rank in ranks) == wire["two_hop"]
            assert all(rank["own"]["nvlink"] == 0 for rank in ranks)
        expected = expected_bytes(
            TOKENS * NODES, 8, NODES, 4, "fp8" if fp8 else "bf16", ranks_per_node=1, dispatcher=dispatcher
        )
        assert wire[dispatcher] == pytest.approx(expected.infiniband, rel=0.01), dispatcher
    assert wire["two_hop"] <= 0.5 * wire["alltoall"]
