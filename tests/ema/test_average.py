"""The average of the weights against a loop in the open, and what happens beside it."""

import threading

import pytest
import torch

from dsv3_megatron.ema import average as module
from dsv3_megatron.ema.average import WeightAverage
from tests.gpu.device import REHEARSAL


def parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (3,), "c": (64, 33)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_a_synchronous_loop(dtype: torch.dtype) -> None:
    """Bit for bit, over steps that change the parameters right after `wait`."""
    weights = parameters(dtype)
    expected = {name: p.float().clone() for name, p in weights.items()}
    average = WeightAverage(weights, decay=0.9)
    assert all(value.dtype == torch.float32 for value in average.average.values())
    for step in range(50):
        average.wait()
        for name, p in weights.items():
            p.add_(torch.full_like(p, 0.01 * (step + 1)))
            expected[name].lerp_(p.float(), 1 - 0.9)
        average.update()
    average.wait()
    for name in weights:
        assert torch.equal(average.average[name], expected[name])

    # By the definition, in float64.
    total = sum(0.1 * 0.9 ** (49 - k) * sum(0.01 * (j + 1) for j in range(k + 1)) for k in range(50))
    if dtype == torch.float32:
        start = parameters(dtype)["b"].double()
        assert torch.allclose(average.average["b"].double(), start + total, rtol=1e-4)


def test_update_does_not_wait_and_wait_does(monkeypatch) -> None:
    weights = parameters(torch.float32)
    average = WeightAverage(weights, decay=0.5)
    go, original = threading.Event(), average._update

    def blocked(written) -> None:
        assert go.wait(10)
        original(written)

    monkeypatch.setattr(average, "_update", blocked)
    before = average.average["a"].clone()
    weights["a"].add_(1)
    average.update()  # returns although nothing can be done yet
    assert torch.equal(average.average["a"], before)
    go.set()
    average.wait()
    assert torch.allclose(average.average["a"], before + 0.5)


def test_a_failure_reaches_the_training_thread() -> None:
    weights = parameters(torch.float32)
    average = WeightAverage(weights, decay=0.5)
    average.average["b"] = torch.zeros(9)
    average.update()
    with pytest.raises(RuntimeError, match="could not be updated"):
        average.wait()


def test_in_place_gives_the_weights_back_even_after_an_error() -> None:
    weights = parameters(torch.bfloat16)
    average = WeightAverage(weights, decay=0.5)
    for p in weights.values():
        p.mul_(3)
    kept = {name: p.clone() for name, p in weights.items()}
    average.update()
    with pytest.raises(KeyError), average.in_place():
        assert all(torch.equal(p, average.average[name].bfloat16()) for name, p in weights.items())
        assert not torch.equal(weights["a"], kept["a"])
        raise KeyError
    assert all(torch.equal(p, kept[name]) for name, p in weights.items())


def follow(average: WeightAverage, weights: dict[str, torch.Tensor]) -> None:
    """Twenty steps, bit for bit as a loop in the open."""
    expected = {name: p.float().cpu().clone() for name, p in weights.items()}
    for _ in range(20):
        average.wait()
        for name, p in weights.items():
            p.mul_(1.01)
            expected[name].lerp_(p.float().cpu(), 1 - 0.9)
        average.update()
    average.wait()
    assert all(torch.equal(average.average[name], expected[name]) for name in weights)


@pytest.mark.gpu
def test_on_a_gpu_only_what_crosses_is_pinned() -> None:
    weights = {name: p.cuda() for name, p in parameters(torch.bfloat16).items()}
    average = WeightAverage(weights, decay=0.9)
    assert not any(value.is_pinned() for value in average.average.values())
    if not REHEARSAL:
        assert [buffer.numel() for buffer in average._buffers.values()] == [64 * 33]
        assert all(buffer.is_pinned() for buffer in average._buffers.values())
    follow(average, weights)


def test_the_way_through_the_buffer_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream, its event and its buffer, with the CPU's stand-ins."""
    monkeypatch.setattr(module, "_on_gpu", lambda parameter: True)
    weights = parameters(torch.bfloat16)
    average = WeightAverage(weights, decay=0.9)
    assert {dtype: buffer.numel() for dtype, buffer in average._buffers.items()} == {torch.bfloat16: 64 * 33}
    follow(average, weights)


def test_the_sums_have_threads_of_their_own() -> None:
    """As many as asked for, in the average's thread only: the training thread keeps what its launcher gave it."""
    before, seen = torch.get_num_threads(), []
    average = WeightAverage(parameters(torch.float32), decay=0.5, num_threads=before + 2)
    original = average._update

    def counted(written: object) -> None:
        seen.append(torch.get_num_threads())
        original(written)

    average._update = counted  # type: ignore[method-assign]
    average.update()
    average.wait()
    assert seen == [before + 2] and torch.get_num_threads() == before


def test_only_the_staging_buffers_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that say where a tensor is and count what is pinned; the update itself is not run."""
    pinned: list[int] = []
    empty = torch.empty

    def counting(*size, pin_memory: bool = False, **kwargs):
        made = empty(*size, **kwargs)
        if pin_memory:
            pinned.append(made.numel() * made.element_size())
        return made

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    devices: list[int] = []
    monkeypatch.setattr(torch, "empty", counting)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    weights = {name: p.as_subclass(OnGpu) for name, p in parameters(torch.bfloat16).items()}
    average = WeightAverage(weights, decay=0.5)
    largest = max(p.numel() for p in weights.values())
    assert pinned == [2 * largest]
    assert sum(value.numel() * 4 for value in average.average.values()) > sum(pinned)
    for _ in range(100):
        if devices:
            break
        threading.Event().wait(0.02)
    assert devices == [3]  # and not device 0, where a new thread begins


@pytest.mark.parametrize(
    ("asked", "cores", "ranks", "threads"),
    [(5, 8, 8, 5), (None, 96, 8, 11), (None, 256, 8, 16), (None, 2, 4, 1)],
)
def test_threads_of_a_rank(asked: int | None, cores: int, ranks: int, threads: int) -> None:
    from argparse import Namespace

    from dsv3_megatron.ema.arguments import threads_of

    assert threads_of(Namespace(ema_threads=asked), cores, ranks) == threads
