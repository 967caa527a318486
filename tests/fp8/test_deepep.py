"""FP8 dispatch through DeepEP's own interface, on a DeepEP that has its signatures and none of its kernels."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.fp8 import deepep, dequantize, quantize_tile
from tests.fp8 import fake_deep_ep
from tests.fp8.test_tiles import matrix
from tests.harness import run_distributed
from tests.parallel.common import Layout, Problem, relative_difference
from tests.specs.models import build

FLEX = (("moe_token_dispatcher_type", "flex"), ("moe_flex_dispatcher_backend", "deepep"))
SIZES = (("hidden_size", 128), ("bf16", True), ("fp8_recipe", "dsv3"))
BF16_DISPATCH = (
    ("fp8_recipe", "delayed"),
    ("fp8_quantizer_factory", "dsv3_megatron.fp8.te_recipe.dsv3+bf16_dispatch"),
)


def moe_layer(rank: int, world_size: int) -> dict[str, tuple[dict[str, Tensor], list[str], bool]]:
    """A MoE layer of two ranks on the same tokens: what came of it, what DeepEP was given, whether it is patched."""
    Layout(world_size=2, ep=2).initialize()
    x = torch.randn(40, 2, 128, generator=torch.Generator().manual_seed(rank)).bfloat16()
    dy = torch.randn(40, 2, 128, generator=torch.Generator().manual_seed(10 + rank)).bfloat16() * 1e-3
    results = {}
    for name, overrides in (("alltoall", ()), ("bf16", (*FLEX, *BF16_DISPATCH)), ("e4m3", FLEX)):
        with fake_deep_ep.installed() as fused_a2a:
            config = Problem(dtype=torch.bfloat16, overrides=(*SIZES, *overrides)).config(Layout(ep=2))
            layer = build(config).bfloat16().decoder.layers[1].mlp
            input = x.clone().requires_grad_()
            y, _ = layer(input)
            y.backward(dy)
            found = {"y": y.detach(), "dx": input.grad}
            found |= {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
            patched = hasattr(fused_a2a.get_buffer, "__dsv3_patch__")
            results[name] = found, list(fake_deep_ep.sent), patched
    return results


@pytest.fixture(scope="module")
def layers() -> list[dict[str, tuple[dict[str, Tensor], list[str], bool]]]:
    return run_distributed(moe_layer, world_size=2, timeout=240)


def test_e4m3_towards_the_experts_only(layers: list) -> None:
    """As through the all-to-all, whose FP8 dispatch has tests of its own, up to bf16's rounding of sums.

    The control: with bf16 dispatch outputs are further away than that, by what E4M3 takes from the tokens.
    """
    for results in layers:
        expected, (flex, sent, patched) = results["alltoall"][0], results["e4m3"]
        assert sent == ["e4m3 forward", "e4m3 backward"] and patched and results["alltoall"][1] == []
        assert flex.keys() == expected.keys() and len(flex) > 6
        for name, tensor in expected.items():
            assert relative_difference(flex[name], tensor) < 2.0**-7, name
        in_bf16 = results["bf16"][0]
        assert relative_difference(in_bf16["y"], expected["y"]) > 2.0**-6


def test_bf16_when_asked(layers: list) -> None:
    for results in layers:
        in_bf16, sent, patched = results["bf16"]
        assert sent == ["bf16 forward", "bf16 backward"] and not patched
        # FP8 products stay: it is within E4M3's error of the other.
        assert relative_difference(in_bf16["y"], results["alltoall"][0]["y"]) < 0.1


class Recorded:
    """A buffer that sends everything back to where it came from, and notes the order of things."""

    def __init__(self, log: list[str]):
        self.log, self.group_size = log, 7

    def dispatch(self, x: Any, **kwargs: Any) -> Any:
        self.log.append(f"dispatch after {kwargs['previous_event']}")
        self.given = kwargs
        return x, "indices", "weights", [1], "handle", Event(self.log)


class Event:
    def __init__(self, log: list[str]):
        self.log = log

    def current_stream_wait(self) -> None:
        self.log.append("wait")


def test_order_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepEP's stream waits for the quantisation, which Megatron's own event precedes; reading waits for DeepEP."""
    log: list[str] = []

    class Arithmetic:
        @staticmethod
        def quantize_tile(x: Tensor, **options: Any) -> Any:
            log.append(f"quantize {options['eps']} {options['pow2']}")
            return quantize_tile(x, **options)

        @staticmethod
        def dequantize(*q: Any) -> Tensor:
            log.append("dequantize")
            return dequantize(*q)

    monkeypatch.setattr(deepep, "arithmetic_for", lambda x: Arithmetic)

    def event_now() -> str:
        log.append("event")
        return "the new event"

    monkeypatch.setattr(deepep, "_event_now", event_now)
    buffer = deepep.FP8Buffer(Recorded(log))
    x = matrix((4, 256)).bfloat16()
    received, *others, _ = buffer.dispatch(x, previous_event="Megatron's", async_finish=True, topk_idx=1)
    assert log == ["quantize 0.0001 True", "event", "dispatch after the new event", "wait", "dequantize"]
    assert others == ["indices", "weights", [1], "handle"] and buffer.group_size == 7
    assert torch.equal(received, dequantize(*quantize_tile(x, pow2=True)).bfloat16())
    log.clear()
    buffer.dispatch(x, handle="handle", previous_event=None, async_finish=False)
    assert log == ["quantize 0.0 True", "dispatch after None", "dequantize"]


def test_only_the_named_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        pass

    ours, another = Group(), Group()
    deepep._groups.add(ours)
    assert deepep.sends_fp8(ours) and not deepep.sends_fp8(another)


def test_signatures_are_deepeps() -> None:
    """Names and order of DeepEP 1.2.1's parameters; 2.1.0's are the same."""
    expected = {
        "dispatch": "self x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert "
        "topk_idx topk_weights expert_alignment num_worst_tokens config previous_event async_finish "
        "allocate_on_comm_stream",
        "combine": "self x handle topk_weights bias config previous_event async_finish allocate_on_comm_stream",
        "get_dispatch_layout": "self topk_idx num_experts previous_event async_finish allocate_on_comm_stream",
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(fake_deep_ep.Buffer, name)).parameters) == parameters.split()
