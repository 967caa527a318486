"""Through the real trainer: what is refused before anything is built, and what an option lets through."""

import re
from pathlib import Path

import pytest

from dsv3_megatron import train_hydra
from tests.harness import run_distributed

MICRO = [
    *("model=micro", "layout=cpu_single", "device=cpu", "seq_length=32", "max_position_embeddings=32"),
    *("global_batch_size=8", "log_interval=1", "train_iters=8", "save_interval=4"),
]
SLOW = pytest.mark.slow


def start(rank: int, world_size: int, words: list[str]) -> int:
    """Exit status of the Hydra trainer."""
    try:
        train_hydra.main(words)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def run(folder: Path, *words: str) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    status = run_distributed(
        start, world_size=1, timeout=240, init=False, log_dir=folder, words=[*MICRO, *words]
    )[0]
    return status, (folder / "rank0.log").read_text()


def rates(log: str) -> dict[int, str]:
    return {int(i): lr for i, lr in re.findall(r"iteration\s+(\d+)/.*?learning rate: (\S+)", log)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iteration 4 of 8."""
    folder = tmp_path_factory.mktemp("saved")
    status, log = run(folder / "log", f"save={folder}/run", "exit_interval=4")
    assert status == 0 and rates(log)[4] == "1.884425E-03"
    return folder / "run"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["moe_router_topk=4"], "--moe-router-topk 2 (this run: 4)"),
        pytest.param(["vocab_size=512", "skip_train=true"], "--vocab-size 256 (this run: 512)", marks=SLOW),
        pytest.param(
            ["finetune=true", "norm_epsilon=1e-5"], "--norm-epsilon 1e-06 (this run: 1e-05)", marks=SLOW
        ),
        pytest.param(["lr=1e-3"], "--lr 0.003 (this run: 0.001)", marks=SLOW),
        pytest.param(["train_iters=12"], "--override-opt-param-scheduler", marks=SLOW),
        (["ckpt_step=3"], "--ckpt-step 3: not a complete checkpoint"),
    ],
)
def test_refused_before_anything_is_built(words: list[str], part: str, saved: Path, tmp_path: Path) -> None:
    status, log = run(tmp_path, f"load={saved}", *words)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and part in errors[0] and "Traceback" not in log
    assert "initialized tensor model parallel" not in log


def test_the_schedule_of_the_checkpoint_without_its_optimizer(saved: Path, tmp_path: Path) -> None:
    words = ["no_load_optim=true", "use_checkpoint_opt_param_scheduler=true", "lr=1e-3", "train_iters=16"]
    status, log = run(tmp_path, f"load={saved}", *words)
    assert status == 0 and rates(log)[5] == "1.300594E-03"
    # The checkpoint's schedule ends after 8 iterations; this run goes on at its end.
    assert rates(log)[8] == rates(log)[16] == "3.000000E-04"


@pytest.mark.parametrize(
    ("words", "fifth"),
    [
        # min_lr + (peak - min_lr) × (1 + cos(π (i − w)/(n − w)))/2 at i = 5, with w = n/10
        (["lr=1e-3", "override_opt_param_scheduler=true"], "5.594133E-04"),
        pytest.param(["train_iters=12", "override_opt_param_scheduler=true"], "2.255879E-03", marks=SLOW),
        pytest.param(["lr=1e-3", "use_checkpoint_opt_param_scheduler=true"], "1.300594E-03", marks=SLOW),
        pytest.param(["no_load_optim=true"], "2.994863E-03", marks=SLOW),  # begins anew, as Megatron says
    ],
)
def test_another_learning_rate(words: list[str], fifth: str, saved: Path, tmp_path: Path) -> None:
    status, log = run(tmp_path, f"load={saved}", *words)
    assert status == 0 and rates(log)[5] == fifth


@pytest.mark.parametrize("name", ["use_distributed_optimizer=false", "bf16=true"])
@SLOW
def test_another_learning_rate_in_every_optimizer(name: str, tmp_path: Path) -> None:
    status, _ = run(tmp_path / "a", name, f"save={tmp_path}/run", "exit_interval=4")
    assert status == 0
    for words, fifth in (
        (["lr=1e-3", "override_opt_param_scheduler=true"], "5.594133E-04"),
        (["lr=1e-3", "use_checkpoint_opt_param_scheduler=true"], "1.300594E-03"),
    ):
        status, log = run(tmp_path / fifth, name, f"load={tmp_path}/run", *words)
        assert status == 0 and rates(log)[5] == fifth


@SLOW
@pytest.mark.parametrize(
    "more", [["finetune=true"], ["no_load_optim=true", "use_checkpoint_opt_param_scheduler=true"]]
)
def test_mtp_dropped_and_added(more: list[str], saved: Path, tmp_path: Path) -> None:
    """Without MTP, and with MTP again, whose weights begin as they would in a new run."""
    changes = "checkpoint_changes=[mtp_num_layers]"
    words = [f"load={saved}", "mtp_num_layers=0", changes, "train_iters=8", *more, f"save={tmp_path}/without"]
    status, log = run(tmp_path / "dropped", *words)
    assert status == 0 and "mtp_1 loss" not in log
    status, log = run(
        tmp_path / "added",
        f"load={tmp_path}/without",
        changes,
        "finetune=true",
        "train_iters=2",
        "mtp_num_layers=1",
    )
    assert status == 0 and float(re.findall(r"mtp_1 loss: (\S+)", log)[0]) > 5.3  # ln 256 = 5.55


@SLOW
def test_an_unmodified_line_goes_on(saved: Path, tmp_path: Path) -> None:
    status, log = run(tmp_path, f"load={saved}")
    assert status == 0 and rates(log)[5] == "1.300594E-03" and rates(log)[8] == "3.000000E-04"


@SLOW
def test_a_first_start_finds_its_folder_empty(tmp_path: Path) -> None:
    words = [f"load={tmp_path}/own", f"save={tmp_path}/own", "train_iters=1", "save_interval=1"]
    assert run(tmp_path / "first", *words)[0] == 0
    status, log = run(tmp_path / "second", *words)
    assert status == 0 and "successfully loaded checkpoint" in log
