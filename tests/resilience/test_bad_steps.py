"""NaN and loss spikes injected on one rank: named by rank, stage and microbatch, and handled as configured."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.resilience.findings import Finding, SpikeDetector, origins
from tests.harness import DistributedFailure, run_distributed
from tests.resilience.ranks import SCHEDULES, WORDS


@dataclass(frozen=True)
class Fault:
    """In step `step` (from 1) a module's output on `rank` is multiplied by `factor` in one pass of `chunk`."""

    rank: int
    chunk: int
    number: int
    step: int
    factor: float = float("nan")
    module: str = "decoder"
    calls: int = 1  # of the module in a pass

    def inject(self, call: dict[str, Any]) -> None:
        if call["iteration"] + 1 != self.step or torch.distributed.get_rank() != self.rank:
            return
        done = [0]

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            done[0] += 1
            if (done[0] - 1) // self.calls != self.number:
                return output
            return (
                (output[0] * self.factor, *output[1:]) if isinstance(output, tuple) else output * self.factor
            )

        spoilt = next(
            m for name, m in call["model"][self.chunk].named_modules() if name.endswith(self.module)
        )
        spoilt.register_forward_hook(spoil)


def state_of(call: dict[str, Any]) -> list[torch.Tensor]:
    """Weights, expert biases and moments."""
    weights = [
        t for chunk in call["model"] for t in chunk.state_dict().values() if isinstance(t, torch.Tensor)
    ]
    moments = [
        t
        for s in call["optimizer"].chained_optimizers
        for p in s.optimizer.state.values()
        for t in p.values()
    ]
    return [t.detach().clone() for t in [*weights, *moments] if isinstance(t, torch.Tensor)]


def train(rank: int, world_size: int, words: list[str], fault: Fault) -> dict[str, Any]:
    """Train; which state (weights, biases, moments) held before each step, as a number per distinct state."""
    from dsv3_megatron.train import main
    from dsv3_megatron.training import hooks

    states: list[list[torch.Tensor]] = []

    def number_of(call: dict[str, Any]) -> int:
        now = state_of(call)
        for number, known in enumerate(states):
            if len(known) == len(now) and all(torch.equal(a, b) for a, b in zip(known, now, strict=True)):
                return number
        states.append(now)
        return len(states) - 1

    trail = []
    hooks.before_step(lambda call: trail.append(number_of(call)))
    hooks.after_step(lambda call, result: last.append(number_of(call)))
    hooks.before_step(fault.inject)
    last: list[int] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(words)
    finite = all(bool(torch.isfinite(t).all()) for t in states[last[-1]])
    return {"trail": [*trail, last[-1]], "printed": printed.getvalue(), "finite": finite}


def run(folder: Path, schedule: str, fault: Fault, *more: str) -> list[dict[str, Any]]:
    words = [
        *WORDS,
        *SCHEDULES[schedule],
        "--save",
        str(folder),
        "--save-interval",
        "2",
        "--train-iters",
        "6",
        *more,
    ]
    return run_distributed(train, world_size=2, timeout=240, init=False, words=words, fault=fault)


# Rank 1 of DualPipe on two ranks runs stage 0 for the second direction, whose four microbatches count from 4.
NAN = Fault(rank=1, chunk=0, number=1, step=4)
NAN_NAMED = "step 4 is bad: the stage's output is not finite on rank 1, stage 0, microbatch 5"


def test_skip_leaves_everything_as_it_was(tmp_path: Path) -> None:
    ranks = run(tmp_path, "dualpipe", NAN, "--on-bad-step", "skip")
    assert f"[guard] {NAN_NAMED}: skip" in ranks[0]["printed"]
    for rank in ranks:
        assert (
            rank["trail"] == [0, 1, 2, 3, 3, 4, 5] and rank["finite"]
        )  # the step after the fourth begins as it did


def test_rewind_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    ranks = run(tmp_path, "dualpipe", NAN, "--on-bad-step", "rewind")
    assert f"[guard] {NAN_NAMED}: rewind" in ranks[0]["printed"]
    assert "[guard] weights, moments and biases are those of iteration 2 again" in ranks[0]["printed"]
    for rank in ranks:
        assert rank["trail"][:5] == [0, 1, 2, 3, 2] and rank["finite"]
        assert rank["trail"][5:] == [4, 5]  # on other data than step 3 saw: not the state after it
    assert "consumed samples:           48" in ranks[1]["printed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "fault", "named"),
    [
        ("dualpipe", NAN, NAN_NAMED),
        (
            "1f1b",
            Fault(0, 0, 2, 2),
            "step 2 is bad: the stage's output is not finite on rank 0, stage 0, microbatch 2",
        ),
        ("1f1b", Fault(1, 0, 3, 1), "step 1 is bad: loss is nan on rank 1, stage 1, microbatch 3"),
    ],
)
def test_stop_ends_all_ranks_with_the_place(schedule: str, fault: Fault, named: str, tmp_path: Path) -> None:
    with pytest.raises(DistributedFailure) as failed:
        run(tmp_path, schedule, fault)
    assert len(re.findall(rf"BadStep: {re.escape(named)}", str(failed.value))) >= 2


@pytest.mark.slow
def test_a_spike_is_named_with_its_loss(tmp_path: Path) -> None:
    """Logits a thousand times too large; the output layer serves the main model and MTP."""
    fault = Fault(rank=1, chunk=0, number=2, step=4, factor=1000.0, module="output_layer", calls=2)
    ranks = run(tmp_path, "1f1b", fault, "--on-bad-step", "skip", "--loss-spike-factor", "2")
    assert ranks[0]["trail"] == [0, 1, 2, 3, 3, 4, 5]
    found = re.search(
        r"step 4 is bad: loss ([\d.]+) per token is above ([\d.]+) on rank 1, stage 1, microbatch 2: skip",
        ranks[0]["printed"],
    )
    assert found and float(found[1]) > float(found[2])


def finding(kind: str, rank: int, stage: int, microbatch: int | None, column: int = 0) -> Finding:
    return Finding(kind, rank, stage, column, microbatch, float("nan"))


def test_the_origin_is_where_a_microbatch_first_went_wrong() -> None:
    first = finding("output", 1, 1, 3)
    follows = [finding("output", 2, 2, 3), finding("output", 3, 3, 3), finding("loss", 3, 3, 3)]
    gradients = [finding("gradient", rank, rank, None) for rank in range(4)]
    assert origins([*gradients, *follows, first]) == [first]
    # Another microbatch, another pipeline: other origins.
    second, third = finding("output", 2, 2, 4), finding("output", 6, 2, 3, column=1)
    assert origins([*follows, second, first, third]) == [first, third, second]


def test_the_last_stage_reports_its_loss_and_gradients_count_alone() -> None:
    loss = finding("loss", 3, 3, 0)
    assert origins([finding("output", 3, 3, 0), loss]) == [loss]
    gradients = [finding("gradient", 2, 2, None), finding("gradient", 0, 0, None)]
    assert origins(gradients) == gradients[::-1]
    assert "gradients are not finite on rank 2" in str(gradients[0])


def test_spikes_are_judged_against_the_median() -> None:
    detector = SpikeDetector(factor=2.0)
    detector.learn([3.0] * 15)
    assert detector.limit is None
    detector.learn([100.0])  # one outlier moves the median nowhere
    assert detector.limit == 6.0
    detector.learn([1.0] * 200)
    assert detector.limit == 2.0
