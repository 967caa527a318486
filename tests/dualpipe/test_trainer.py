"""The trainer gives the same losses under every schedule: the demo's model, the same seed and data."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv3_megatron.demo.results import read_curves
from tests.harness import run_distributed

LOSSES = ("lm loss", "mtp_1 loss", "seq_load_balancing_loss")
# Two V's: eight stages, of which four hold no decoder layer.
TWO_VS = "zigzag pipeline_zigzag_chunks=4 pipeline_model_parallel_layout='Et||t||t||t|mL'"
MODEL = ["model=tiny", "layout=cpu_pp2_ep2", "device=cpu", "lr=1e-3", "eval_iters=0"]


@dataclass(frozen=True)
class Training:
    """How long, on what, and which schedules are compared with 1F1B."""

    name: str
    steps: int
    sequence: int
    global_batch: int
    micro_batch: int = 1
    ep: int = 2
    schedules: tuple[str, ...] = ("dualpipe", "dualpipev", "zigzag", TWO_VS)  # and further overrides
    learned: float = 0.2  # the least that 1F1B's loss falls

    def __str__(self) -> str:
        return self.name

    def curves(self, folder: Path, schedule: str) -> dict[str, dict[int, float]]:
        """What a run under `schedule` logged, by loss and iteration."""
        schedule, *further = schedule.split()
        overrides = [*MODEL, f"schedule={schedule}", *further, f"train_iters={self.steps}"]
        folder = folder / str(len(further))
        overrides += [f"seq_length={self.sequence}", f"max_position_embeddings={self.sequence}"]
        overrides += [f"global_batch_size={self.global_batch}", f"micro_batch_size={self.micro_batch}"]
        overrides += [f"expert_model_parallel_size={self.ep}", f"tensorboard_dir={folder / schedule}"]
        overrides += ["tensorboard_log_interval=1", "log_interval=1"]
        run_distributed(train, world_size=2 * self.ep, timeout=240, init=False, overrides=overrides)
        logged = read_curves(folder / schedule)
        return {name: logged[name] for name in LOSSES}


def train(rank: int, world_size: int, overrides: list[str]) -> dict:
    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv

    return train.main(to_argv(compose(overrides)))


TRAININGS = [
    Training("five_steps", 5, 64, 8, ep=1, schedules=("dualpipe",), learned=0.02),
    pytest.param(Training("short", 20, 64, 8), marks=pytest.mark.slow),
    pytest.param(Training("as_the_demo", 20, 256, 16, micro_batch=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_schedules_give_the_same_losses(training: Training, tmp_path: Path) -> None:
    expected = training.curves(tmp_path, "1f1b")
    losses = expected["lm loss"]
    assert list(losses) == list(range(1, training.steps + 1))
    assert losses[training.steps] < losses[1] - training.learned
    for schedule in training.schedules:
        got = training.curves(tmp_path, schedule)
        for name in LOSSES:
            assert got[name] == pytest.approx(expected[name], rel=1e-4), (schedule, name)
