"""The demo from corpus to result: prepare, train in four processes, evaluate, draw."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dsv3_megatron.conf import compose
from dsv3_megatron.conf.check import data_parallel_size, world_size
from dsv3_megatron.demo.corpus import prepare_corpus, read_tokens, vocab_size_of
from dsv3_megatron.demo.heldout import ordered_windows
from dsv3_megatron.demo.launch import run_ranks
from dsv3_megatron.demo.picture import draw
from dsv3_megatron.demo.results import read_curves, summarise
from dsv3_megatron.demo.unigram import unigram_loss
from dsv3_megatron.pipeline.traits import TRAITS

PROFILED_STEP = 10  # of a run: the first ones take longer
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class DemoSettings:
    """What a run folder is for; a folder begun with other settings is refused."""

    layout: str = "cpu_pp2_ep2"
    schedule: str = "dualpipe"
    train_iters: int = 200
    corpus_bytes: int = 6_000_000
    valid_fraction: float = 0.1
    num_windows: int = 64
    seed: int = 1234
    overrides: tuple[str, ...] = ()


def run_demo(run_dir: Path, settings: DemoSettings, more_iters: int) -> dict[str, Any]:
    """Train to `settings.train_iters`, or, if `run_dir` got there already, `more_iters` further; returns the
    result.

    Writes `corpus/`, `checkpoints/`, `tensorboard/`, `logs/`, `loss.png`, `result.json` and, for the tenth step of the
    run, `pipeline_step‹N›.{png,svg,json}` in `run_dir`.

    Raises:
        ValueError: `run_dir` was begun with other settings, or a setting is not possible.
        RunFailed, RunInterrupted: see `launch.run_ranks`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    keep_settings(run_dir / SETTINGS_FILE, settings)
    resumed_from = saved_iteration(run_dir / "checkpoints")
    iterations = settings.train_iters if resumed_from < settings.train_iters else resumed_from + more_iters
    overrides = trainer_overrides(run_dir, settings, iterations)
    if settings.schedule != "1f1b":
        step = min(resumed_from + PROFILED_STEP, iterations)
        overrides += [f"profile_pipeline={step}", f"profile_pipeline_dir={quoted(run_dir)}"]
    cfg = compose(overrides)
    _check_windows(cfg, settings.num_windows)

    corpus = run_dir / "corpus"
    prepare_corpus(corpus, settings.corpus_bytes, cfg.vocab_size, settings.valid_fraction)
    baseline = held_out_unigram_loss(corpus, settings.num_windows, cfg.seq_length)
    print(f"[demo] a unigram model of the corpus has a held-out loss of {baseline:.4f}", flush=True)

    _announce(cfg, resumed_from, iterations)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the ranks: the demo is one of the CPU runtime
    words = [
        "--corpus",
        str(corpus),
        "--num-windows",
        str(settings.num_windows),
        "--seed",
        str(settings.seed),
    ]
    run_ranks("dsv3_megatron.demo.worker", [*words, *overrides], world_size(cfg), run_dir / "logs")

    curves = read_curves(run_dir / "tensorboard")
    result = summarise(curves, baseline, saved_iteration(run_dir / "checkpoints"), resumed_from)
    draw(curves, result, run_dir / "loss.png")
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def trainer_overrides(run_dir: Path, settings: DemoSettings, iterations: int) -> list[str]:
    """The overrides of `dsv3_megatron.train_hydra` for this run."""
    return [
        "model=tiny",
        f"layout={settings.layout}",
        f"schedule={settings.schedule}",
        "data=indexed",
        "device=cpu",
        f"corpus.dir={quoted(run_dir / 'corpus')}",
        f"data_cache_path={quoted(run_dir / 'corpus' / 'cache')}",
        f"train_iters={iterations}",
        # The learning rate has its course in the first run, and stays at its end in later ones.
        f"lr_decay_iters={settings.train_iters}",
        # Megatron compares train_iters, as the length of the weight decay's course, with the checkpoint's.
        "override_opt_param_scheduler=true",
        "seq_length=256",
        "max_position_embeddings=256",
        "global_batch_size=16",
        "micro_batch_size=2",
        # The report's 0.001 moves the bias by at most 0.2 in 200 iterations: too little for balance.
        "moe_router_bias_update_rate=0.01",
        "allow_deviation=[moe_router_bias_update_rate]",
        f"seed={settings.seed}",
        f"eval_interval={max(settings.train_iters // 8, 1)}",
        "eval_iters=1",
        f"save={quoted(run_dir / 'checkpoints')}",
        f"load={quoted(run_dir / 'checkpoints')}",
        f"save_interval={max(settings.train_iters // 2, 1)}",
        f"tensorboard_dir={quoted(run_dir / 'tensorboard')}",
        "tensorboard_log_interval=1",
        "log_interval=1",
        *settings.overrides,
    ]


def _check_windows(cfg: DictConfig, num_windows: int) -> None:
    """The held-out windows are evaluated with the schedule of the training, which needs enough of them."""
    schedule = cfg.pipeline_schedule or "1f1b"
    traits = TRAITS[schedule]
    replicas = data_parallel_size(cfg) * traits.directions
    windows = replicas * cfg.micro_batch_size  # one microbatch on each replica
    least = traits.least_microbatches // traits.directions * cfg.pipeline_model_parallel_size
    if num_windows % windows or num_windows < max(1, least) * windows:
        raise ValueError(
            f"--num-windows {num_windows}: {schedule} on this layout evaluates a multiple of {windows} windows, and at "
            f"least {max(1, least) * windows}"
        )


def quoted(path: Path) -> str:
    """A path as the value of an override, whatever characters it has."""
    return "'" + str(path).replace("'", r"\'") + "'"


def held_out_unigram_loss(corpus: Path, num_windows: int, seq_length: int) -> float:
    """Loss of the unigram model of the training tokens on the targets that the model is evaluated on."""
    windows = ordered_windows(read_tokens(corpus, "valid"), num_windows, seq_length)
    return unigram_loss(read_tokens(corpus, "train"), windows.targets(), vocab_size_of(corpus))


def saved_iteration(checkpoints: Path) -> int:
    """Iteration of the newest complete checkpoint, 0 if there is none."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def keep_settings(path: Path, settings: Any) -> None:
    """Write the settings (a dataclass) of a run folder that begins; refuse others in one that is there.

    Raises:
        ValueError: names what differs.
    """
    asked = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        path.write_text(json.dumps(asked, indent=2) + "\n")
        return
    there = json.loads(path.read_text())
    changes = [
        f"{name} {there.get(name)} there, {value} asked"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if changes:
        raise ValueError(
            f"--run-dir {path.parent} was begun with other settings ({'; '.join(changes)}): "
            "use a new --run-dir, or remove this one"
        )


def _announce(cfg: DictConfig, resumed_from: int, iterations: int) -> None:
    begin = f"resuming from iteration {resumed_from}" if resumed_from else "starting"
    print(
        f"[demo] {begin}, to iteration {iterations}: {cfg.pipeline_schedule or '1f1b'}, {world_size(cfg)} processes, "
        f"PP{cfg.pipeline_model_parallel_size} × EP{cfg.expert_model_parallel_size}, "
        f"{cfg.num_layers} layers, {cfg.num_experts} experts, "
        f"{cfg.global_batch_size} × {cfg.seq_length} tokens per iteration",
        flush=True,
    )
