"""The trainer gives the same losses under every schedule: the demo's model, the same seed and data."""

from pathlib import Path

import pytest

from dsv3_megatron.demo.results import read_curves
from tests.harness import run_distributed

STEPS = 20
LOSSES = ("lm loss", "mtp_1 loss", "seq_load_balancing_loss")
MODEL = ["model=tiny", "layout=cpu_pp2_ep2", "device=cpu", f"train_iters={STEPS}", "lr=1e-3"]
SHORT = ["seq_length=64", "max_position_embeddings=64", "global_batch_size=8", "micro_batch_size=1"]
AS_DEMO = ["seq_length=256", "max_position_embeddings=256", "global_batch_size=16", "micro_batch_size=2"]


def train(rank: int, world_size: int, overrides: list[str]) -> dict:
    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv

    return train.main(to_argv(compose(overrides)))


def curves(folder: Path, schedule: str, sizes: list[str]) -> dict[str, dict[int, float]]:
    overrides = [*MODEL, *sizes, f"schedule={schedule}", f"tensorboard_dir={folder / schedule}"]
    overrides += ["tensorboard_log_interval=1", "log_interval=1", "eval_iters=0"]
    run_distributed(train, world_size=4, timeout=240, init=False, overrides=overrides)
    logged = read_curves(folder / schedule)
    return {name: logged[name] for name in LOSSES}


@pytest.mark.parametrize(
    "sizes", [SHORT, pytest.param(AS_DEMO, marks=pytest.mark.slow)], ids=["short", "demo"]
)
def test_same_losses_after_20_steps(sizes: list[str], tmp_path) -> None:
    expected = curves(tmp_path, "1f1b", sizes)
    assert list(expected["lm loss"]) == list(range(1, STEPS + 1))
    assert expected["lm loss"][STEPS] < expected["lm loss"][1] - 0.2  # it learns
    for schedule in ("dualpipe", "dualpipev"):
        got = curves(tmp_path, schedule, sizes)
        for name in LOSSES:
            assert got[name] == pytest.approx(expected[name], rel=1e-4), (schedule, name)
