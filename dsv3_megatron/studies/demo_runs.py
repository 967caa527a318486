"""Runs of the demo's model on the demo's corpus that differ in a few overrides, to be compared."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dsv3_megatron.demo.corpus import prepare_corpus
from dsv3_megatron.demo.launch import run_ranks
from dsv3_megatron.demo.results import TRAIN_LOSS, Curve, read_curves
from dsv3_megatron.demo.run import DemoSettings, saved_iteration, trainer_overrides

DECAY = 0.9  # of the exponential moving average
# For a noise floor: every initial weight is a 1024th larger, a quarter of a BF16 rounding: most round to the same
# number.
PERTURBED = f"init_method_std={0.02 * (1 + 2**-10)}"


def prepare(run_dir: Path) -> None:
    """The corpus of all runs of a study, in `run_dir`/corpus."""
    prepare_corpus(run_dir / "corpus", DemoSettings.corpus_bytes, 2048, DemoSettings.valid_fraction)


def train(name: str, run_dir: Path, iterations: int, overrides: Sequence[str]) -> None:
    """Train one run in one process to its end, unless it is there already; it goes on from its checkpoint.

    Raises:
        RunFailed, RunInterrupted: see `dsv3_megatron.demo.launch.run_ranks`.
    """
    folder, corpus = run_dir / name, run_dir / "corpus"
    if saved_iteration(folder / "checkpoints") >= iterations:
        return
    own = (*overrides, f"corpus.dir='{corpus}'", f"data_cache_path='{corpus / 'cache'}'")
    settings = DemoSettings(layout="cpu_single", schedule="1f1b", train_iters=iterations, overrides=own)
    print(f"[study] {name}: {iterations} iterations", flush=True)
    words = trainer_overrides(folder, settings, iterations)
    run_ranks("dsv3_megatron.train_hydra", words, 1, folder / "logs")


def losses(names: Iterable[str], run_dir: Path, iterations: int) -> dict[str, Curve]:
    """Training loss of each step of the runs that have come to their end."""
    return {
        name: read_curves(run_dir / name / "tensorboard")[TRAIN_LOSS]
        for name in names
        if saved_iteration(run_dir / name / "checkpoints") >= iterations
    }


def smoothed(curve: Curve, decay: float = DECAY) -> Curve:
    """Exponential moving average over steps, started at the first loss."""
    average, result = None, {}
    for step, loss in sorted(curve.items()):
        average = loss if average is None else decay * average + (1 - decay) * loss
        result[step] = average
    return result
