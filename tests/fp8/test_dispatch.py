"""Messages of FP8 dispatch, and what they carry in which direction between two ranks."""

import pytest
import torch

from dsv3_megatron.fp8 import dequantize, quantize_tile
from dsv3_megatron.fp8.dispatch import _AllToAll, decode_message, encode_message
from tests.fp8 import independent
from tests.fp8.test_tiles import matrix
from tests.harness import run_distributed


@pytest.mark.parametrize("shape", [(5, 128), (3, 200), (0, 200), (1, 1)])
@pytest.mark.parametrize("eps, scale", [(1e-4, 1.0), (0.0, 1e-9)])
def test_message(shape: tuple[int, int], eps: float, scale: float) -> None:
    """One byte per number and one per tile; what arrives is what the expert's own quantisation would give."""
    x = matrix(shape, scale=scale)
    message = encode_message(x, eps)
    assert message.dtype == torch.uint8 and message.shape == (shape[0], shape[1] + -(-shape[1] // 128))
    received = decode_message(message, shape[1])
    assert torch.equal(received, dequantize(*quantize_tile(x, eps=eps, pow2=True)))
    assert torch.equal(received.bfloat16().float(), received)  # bf16 holds it exactly
    if shape[0]:
        wanted = independent.tile(x.numpy(), 1, 128, eps, pow2=True)
        torch.testing.assert_close(received.double(), torch.from_numpy(wanted), rtol=0, atol=0)


def test_message_of_unusual_numbers() -> None:
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 2.0], [1e-40, 0.0]])
    received = decode_message(encode_message(x, 0.0), 2)
    assert (
        received[0].tolist() == [0, 0]
        and received[1:3, 0].isnan().all()
        and received[1:3, 1].tolist() == [1, 2]
    )
    assert received[3].isfinite().all()


def exchange(rank: int, world_size: int, to_experts: bool) -> dict[str, torch.Tensor]:
    """One all-to-all there and back between two ranks with uneven splits; what it did to x and to the gradient."""
    import torch.distributed as dist

    sent: list[torch.dtype] = []
    original = dist.all_to_all_single

    def recorded(output: torch.Tensor, input: torch.Tensor, *args: object, **kwargs: object) -> object:
        sent.append(input.dtype)
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = recorded
    input_splits, output_splits = ([1, 3], [1, 2]) if rank == 0 else ([2, 0], [3, 0])
    x = matrix((sum(input_splits), 200), seed=rank).bfloat16().requires_grad_()
    y = _AllToAll.apply(x, dist.group.WORLD, output_splits, input_splits, to_experts)
    dy = matrix((sum(output_splits), 200), seed=10 + rank, scale=1e-6).bfloat16()
    y.backward(dy)
    assert x.grad is not None
    sizes = [str(dtype) for dtype in sent]
    return {"x": x.detach(), "y": y.detach(), "dy": dy, "dx": x.grad, "dtypes": sizes}  # type: ignore[dict-item]


@pytest.mark.parametrize("to_experts", [True, False], ids=["dispatch", "combine"])
def test_e4m3_towards_the_experts_only(to_experts: bool) -> None:
    first, second = run_distributed(exchange, world_size=2, to_experts=to_experts)

    def wire(x: torch.Tensor, eps: float) -> torch.Tensor:
        return decode_message(encode_message(x, eps), 200).bfloat16()

    e4m3 = "torch.uint8", "torch.bfloat16"
    assert first["dtypes"] == list(e4m3 if to_experts else reversed(e4m3))
    # Rank 0 keeps its first row and gets rank 1's two; backward the other way round.
    sent = torch.cat([first["x"][:1], second["x"]])
    assert torch.equal(first["y"], wire(sent, 1e-4) if to_experts else sent)
    assert not torch.equal(wire(sent, 1e-4), sent)
    returned = torch.cat([first["dy"][:1], second["dy"]])
    assert torch.equal(first["dx"], returned if to_experts else wire(returned, 0.0))
    assert not torch.equal(wire(returned, 0.0), returned)
