"""Through the real trainer: what one schedule and layout saves, any other loads, optimizer state included."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dsv3_megatron.demo.results import read_curves
from tests.arguments.lines import MICRO
from tests.harness import run_distributed
from tests.parallel.common import relative_difference
from tests.parallel.test_resume import tensors, train

WORDS = [
    *("--spec", "dsv3", "--device", "cpu", *MICRO, "--use-distributed-optimizer"),
    *("--log-interval", "1", "--lr-warmup-iters", "1", "--save-interval", "2"),
]
LOSSES = ("lm loss", "mtp_1 loss", "seq_load_balancing_loss", "grad-norm")
Curves = dict[str, dict[int, float]]  # by name and iteration


@dataclass(frozen=True)
class Leg:
    """How some steps of a training are run."""

    schedule: str
    pp: int = 2
    ep: int = 1
    world_size: int = 2
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.schedule}_pp{self.pp}_ep{self.ep}_of_{self.world_size}"

    def run(self, folder: Path, upto: int, all_steps: int, *words: str) -> Curves:
        """Train up to iteration `upto` of `all_steps`, saving in `folder`; what was logged, by iteration."""
        curves = folder / "curves"
        given = [*WORDS, "--pipeline-schedule", self.schedule, "--pipeline-model-parallel-size", str(self.pp)]
        given += ["--expert-model-parallel-size", str(self.ep), "--train-iters", str(all_steps)]
        given += ["--exit-interval", str(upto), "--save", str(folder), "--tensorboard-dir", str(curves)]
        given += [*self.words, *words]
        run_distributed(train, world_size=self.world_size, timeout=150, init=False, words=given)
        logged = read_curves(curves)
        return {name: logged[name] for name in LOSSES}

    def resume(self, folder: Path, source: Path, after: int, upto: int, all_steps: int) -> Curves:
        load = ["--load", str(source), "--ckpt-step", str(after)]
        return self.run(folder, upto, all_steps, *load)


ONE_PROCESS = Leg("1f1b", pp=1, world_size=1)
TWO_VS = ("--pipeline-zigzag-chunks", "4", "--pipeline-model-parallel-layout", "Et||t||t||t|mL")
RELAY = [
    Leg("1f1b"),
    Leg("dualpipe"),
    Leg("dualpipev"),
    Leg("dualpipe", pp=4, world_size=4),
    Leg("zb1p", ep=2, world_size=4),
    Leg("dualpipe", ep=2, world_size=4),
    ONE_PROCESS,
]
# From and to every other schedule, with one V and with two.
ZIGZAG_RELAY = [
    Leg("zigzag"),
    Leg("dualpipe"),
    Leg("zigzag", words=TWO_VS),
    Leg("1f1b"),
    Leg("zigzag", ep=2, world_size=4),
    Leg("dualpipev"),
    Leg("zigzag", words=TWO_VS),
    Leg("zb1p"),
    ONE_PROCESS,
]


def assert_same_checkpoint(got: Path, expected: Path) -> None:
    """The same names; weights and moments agree to fp32 rounding of a few steps. Random states belong to a layout."""
    a, b = (
        {name: value for name, value in tensors(path).items() if not name.startswith("rng_state")}
        for path in (got, expected)
    )
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    differences = {name: relative_difference(a[name], b[name]) for name in b}
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < 1e-3, (worst, differences[worst])


@pytest.mark.parametrize(
    "relay",
    [
        pytest.param([ONE_PROCESS, Leg("dualpipe")], id="there"),
        pytest.param(
            [ONE_PROCESS, Leg("dualpipe"), ONE_PROCESS], id="there_and_back", marks=pytest.mark.slow
        ),
        pytest.param(RELAY, id="all", marks=pytest.mark.slow),
        pytest.param(ZIGZAG_RELAY, id="zigzag", marks=pytest.mark.slow),
    ],
)
def test_relay_equals_one_run(relay: list[Leg], tmp_path: Path) -> None:
    """Two steps under each of `relay`, handed on by checkpoint, are the steps of one run under the first of them.

    That every shard has exactly one writer is what Megatron checks when it saves.
    """
    first, *others = relay
    steps = 2 * len(relay)
    source = tmp_path / "straight"
    straight = first.run(source, steps, steps)
    for number, leg in enumerate(others, start=1):
        folder, after, upto = tmp_path / f"{number}_{leg}", 2 * number, 2 * number + 2
        logged = leg.resume(folder, source, after, upto, steps)
        for name in LOSSES:
            assert logged[name].keys() == {after + 1, after + 2}, (leg, name)
            expected = {i: straight[name][i] for i in logged[name]}
            # The norm is the most sensitive: a moment or a weight that was not loaded moves it at once.
            assert logged[name] == pytest.approx(expected, rel=1e-5 if "loss" in name else 1e-4), (leg, name)
        checkpoint = f"iter_{upto:07d}"
        assert_same_checkpoint(folder / checkpoint, tmp_path / "straight" / checkpoint)
        source = folder


@pytest.mark.slow  # by default `tests/ema/test_trainer.py` resumes a DualPipe run and compares bits
@pytest.mark.parametrize(
    "leg", [Leg("dualpipe"), Leg("dualpipe", ep=2, world_size=4), Leg("zigzag")], ids=str
)
def test_resumed_dualpipe_is_the_uninterrupted_run_bit_for_bit(leg: Leg, tmp_path) -> None:
    straight = leg.run(tmp_path / "straight", 4, 4)
    resumed = leg.resume(tmp_path / "resumed", tmp_path / "straight", 2, 4, 4)
    for name in LOSSES:
        assert resumed[name] == {i: straight[name][i] for i in (3, 4)}
    a, b = (tensors(tmp_path / run / "iter_0000004") for run in ("straight", "resumed"))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    half = tensors(tmp_path / "straight" / "iter_0000002")
    assert sum(not torch.equal(a[name], half[name]) for name in a) > 50
