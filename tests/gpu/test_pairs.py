"""An overlapped pair in one process: as good as its halves one after the other, and how much of it overlaps.

With one rank an all-to-all hands on its input, which Megatron's nodes then free. Here it makes a copy, on the stream of
communication: that is what overlaps.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.gpu import overlap
from tests.gpu.device import REHEARSAL, sizes
from tests.gpu.test_backends import BF16, SIZES, distance, one_gpu  # noqa: F401  (fixture)
from tests.specs.models import build, micro_config, random_batch

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]
ORDER = "report"


def model_and_batches() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    sizes_of_model = {**SIZES, "mtp_num_layers": None, "num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
    model = build(micro_config(**sizes_of_model, **BF16)).cuda().bfloat16()
    batches = [
        {name: tensor.cuda() for name, tensor in random_batch(batch=sizes(8, 1), seq=128, seed=seed).items()}
        for seed in (0, 1)
    ]
    return model, batches


def plan_of(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model.build_schedule_plan(batch["input_ids"], batch["position_ids"], None, labels=batch["labels"])


def gradient_of(output: torch.Tensor) -> torch.Tensor:
    """Of the mean of the losses."""
    return torch.full_like(output, 1 / output.numel())


def copying(all_to_all: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's all-to-all, whose result is another tensor than its input."""
    return lambda *args, **kwargs: all_to_all(*args, **kwargs).clone()


def run(together: bool, events: list | None = None) -> dict[str, torch.Tensor]:
    """Forward of batch 1 and backward of batch 0, as a pair or one after the other: outputs and gradients."""
    from megatron.core.pipeline_parallel.utils import set_streams
    from megatron.core.transformer.moe import token_dispatcher

    set_streams()
    model, batches = model_and_batches()
    with mock.patch.object(token_dispatcher, "all_to_all", copying(token_dispatcher.all_to_all)):
        first, second = halves(model, batches, together, events)
    torch.cuda.synchronize()
    found = {"first": first.detach().clone(), "second": second.detach().clone()}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def ignored(message: torch.Tensor) -> None:
    """There is no neighbour."""


def halves(
    model: Any, batches: list[dict[str, torch.Tensor]], together: bool, events: list | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of both batches; the first has run forward and backward then."""
    from dsv3_megatron.dualpipe.overlap import CommunicationThread, run_pair
    from dsv3_megatron.dualpipe.pair_orders import ORDERS

    plans = [plan_of(model, batch) for batch in batches]
    first = plans[0].run(plans[0], None)
    if together:
        thread = CommunicationThread() if REHEARSAL else None
        second = run_pair(
            ORDERS[ORDER], plans[1], plans[0], gradient_of(first), (ignored, ignored), thread, events
        )
    else:
        plans[0].run(None, plans[0], b_grad=gradient_of(first))
        second = plans[1].run(plans[1], None)
    return first, second


def test_a_pair_is_its_halves_and_overlaps(
    one_gpu: None,  # noqa: F811
    tmp_path: Path,
    record_property: Record,
) -> None:
    apart, together = run(together=False), run(together=True)
    assert apart.keys() == together.keys() and len(apart) > 20
    worst = max(apart, key=lambda name: distance(together[name].double(), apart[name].double()))
    gap = distance(together[worst].double(), apart[worst].double())
    record_property("largest_difference", f"{gap:.1e} ({worst})")
    assert gap < 2.0**-7, worst  # sums in bf16 in another order
    seen = profiled(tmp_path)
    record_property("streams", len({interval.stream for interval in seen}))
    record_property("overlap_share", f"{overlap.overlap_share(seen):.0%}")
    assert len({interval.stream for interval in seen}) >= 2, "everything ran on one stream"


def profiled(folder: Path) -> list[overlap.Interval]:
    """What ran on which stream: kernels by torch's profiler; in a rehearsal the nodes, by their threads."""
    if REHEARSAL:
        events: list[Any] = []
        run(together=True, events=events)
        return [overlap.Interval(event.lane, event.start, event.end) for event in events]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run(together=True)
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    return overlap.kernels_of(trace)
