"""The order of the data: the same samples in every step whatever the data-parallel size, also after a resume."""

from typing import Any

import numpy as np
import pytest

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

SEQ, STEPS, BATCH = 32, 4, 8
# Documents of two corpora are known by their tokens: below 50, and from 50 on.
RANGES = {"a": (1, 50), "b": (50, 100)}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    """The words of a blend, 3 to 1."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for name, (low, high) in RANGES.items():
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for _ in range(200):
            length = int(rng.integers(5, 60))
            builder.add_document(rng.integers(low, high, size=length).astype(np.uint16), [length])
        builder.finalize(str(folder / f"{name}.idx"))
    blend = ["--train-data-path", "0.75", str(folder / "a"), "0.25", str(folder / "b")]
    tokenizer = ["--tokenizer-type", "NullTokenizer"]
    return [*blend, *tokenizer, "--data-cache-path", str(folder / "cache")]


def train(rank: int, world_size: int, words: list[str]) -> list[list[bytes]]:
    """The tokens of every sample that this rank has read, by step."""
    from dsv3_megatron import train
    from dsv3_megatron.training import hooks, step

    steps: list[list[bytes]] = []
    original = step.get_batch

    def reading(data_iterator: Any, model: Any) -> dict[str, Any]:
        batch = original(data_iterator, model)
        steps[-1] += [row.numpy().astype(np.int64).tobytes() for row in batch["tokens"]]
        return batch

    step.get_batch = reading
    hooks.before_step(lambda call: steps.append([]))
    try:
        train.main(words)
    except SystemExit as left:
        assert not left.code
    return steps


def run(words: list[str], corpora: list[str], world_size: int) -> list[set[bytes]]:
    """The samples of each step, over all ranks."""
    drop = {"--mock-data", "--train-iters"}
    micro = [
        w
        for before, w in zip(["", *MICRO], MICRO, strict=False)
        if w not in drop and before != "--train-iters"
    ]
    line = ["--spec", "dsv3", "--device", "cpu", *micro, *corpora, "--train-iters", str(STEPS), *words]
    line += ["--log-interval", "1000", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    ranks = run_distributed(train, world_size, timeout=400, init=False, words=line)
    return [{sample for rank in ranks for sample in rank[step]} for step in range(len(ranks[0]))]


def test_same_samples_for_any_data_parallel_size_and_after_a_resume(corpora, tmp_path) -> None:
    one = run(["--save", str(tmp_path), "--save-interval", "2"], corpora, 1)
    assert [len(step) for step in one] == [BATCH] * STEPS
    assert len(set.union(*one)) == STEPS * BATCH  # no sample twice
    # A resume goes on with the next sample, here on twice as many ranks.
    assert run(["--load", str(tmp_path), "--ckpt-step", "2"], corpora, 2) == one[2:]

    # The blend: 3 of 4 samples are of the first corpus.
    samples = [np.frombuffer(sample, np.int64) for step in one for sample in step]
    of_first = sum(sample.max() < 50 for sample in samples)
    assert all((sample < 50).all() or (sample[sample > 0] >= 50).all() for sample in samples)
    assert abs(of_first - 0.75 * len(samples)) <= 1
