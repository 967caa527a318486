"""Through the real trainer: no gradient crosses from one sample of a row to another, under every schedule.

Each row holds three samples with tokens of their own and padding. Only the middle one has answers; so of the embedding
only its tokens may have a gradient. Megatron's own forward step drops the boundaries where a schedule plan is built.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.arguments.lines import MICRO
from tests.harness import run_distributed
from tests.parallel.common import join_tensors, relative_difference

SEQ_LENGTH, ROWS = 32, 8
BEFORE, LEARNT, AFTER = range(100, 150), range(50, 100), range(150, 200)  # tokens of the three samples
# The micro model with the tokenizer's vocabulary, and data of its own.
MODEL = (
    " ".join(MICRO)
    .replace("--mock-data", "")
    .replace("--vocab-size 128", "")
    .replace("--train-iters 3", "")
    .split()
)
EMBEDDING = "embedding.word_embeddings.weight"


def write_rows(folder: Path, tokenizer: Path) -> None:
    """Rows of [BEFORE, LEARNT, AFTER, padding] with sizes that differ from row to row."""
    random = np.random.default_rng(0)
    tokens = np.full((ROWS, SEQ_LENGTH), 4, np.uint16)  # <|pad_token|>
    answers, ends = np.zeros(tokens.shape, bool), np.full((ROWS, 3), SEQ_LENGTH, np.int32)
    for row in range(ROWS):
        sizes = random.integers(6, 10, 3)
        ends[row] = sizes.cumsum()
        for part, span in enumerate((BEFORE, LEARNT, AFTER)):
            start, end = ends[row][part] - sizes[part], ends[row][part]
            tokens[row, start:end] = random.choice(span, sizes[part])
            answers[row, start + 1 : end] = span is LEARNT
    folder.mkdir()
    for name, array in (("tokens", tokens), ("answers", answers), ("ends", ends)):
        np.save(folder / f"train_{name}.npy", array)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    report = {"seq_length": SEQ_LENGTH, "train": {"rows": ROWS}}
    (folder / "sft.json").write_text(json.dumps(report))


def train(rank: int, world_size: int, words: list[str], drop_boundaries: bool = False) -> dict[str, Any]:
    """Gradients by global name before the first update, overlapped pairs, and padding told to the routers."""
    from dsv3_megatron.dualpipe import overlap
    from dsv3_megatron.specs.names import global_names, named_weights
    from dsv3_megatron.specs.router import DSV3Router
    from dsv3_megatron.train import main
    from dsv3_megatron.training import hooks, step

    grads: dict[str, Any] = {}
    pairs, padded = [0], []

    def note_padding(router: Any, inputs: tuple[Any, ...]) -> None:
        if inputs[1] is not None:  # in pre-training there is none
            padded.append(int(inputs[1].sum()))

    def look_at_routers(call: dict[str, Any]) -> None:
        for chunk in call["model"]:
            for name, module in chunk.named_modules():
                if isinstance(module, DSV3Router) and "mtp" not in name:
                    module.register_forward_pre_hook(note_padding)

    def keep(call: dict[str, Any]) -> None:
        for chunk in call["model"]:
            names = global_names(chunk)
            for local, weight in named_weights(chunk).items():
                if hasattr(weight, "main_grad"):
                    grads[names[local].name] = (names[local].shard, weight.main_grad.detach().clone())

    @functools.wraps(overlap.run_pair)
    def counted(*args: Any, **kwargs: Any) -> Any:
        pairs[0] += 1
        return run_pair(*args, **kwargs)

    run_pair, overlap.run_pair = overlap.run_pair, counted
    if drop_boundaries:
        step.packed_seq_params = lambda batch: None
    hooks.before_step(look_at_routers)
    hooks.before_update(keep)
    main(words)
    return {"grads": grads, "pairs": pairs[0], "padded": padded}


class Setup:
    """A checkpoint and rows, and one step of fine-tuning from there in any layout."""

    def __init__(self, folder: Path, tokenizer: Path, mtp: int) -> None:
        self.folder, self.mtp = folder, mtp
        write_rows(folder / "rows", tokenizer)
        self.common = ["--spec", "dsv3", "--device", "cpu", *MODEL, "--init-method-std", "0.1"]
        self.common += ["--mtp-num-layers", str(mtp)]
        begin = [
            "--mock-data",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(folder / "rows"),
        ]
        begin += ["--train-iters", "1", "--save", str(folder / "pretrained"), "--save-interval", "1"]
        self._run(1, [*self.common, *begin])
        self.reference = self.step("1f1b", world_size=1, pp=1)

    @staticmethod
    def _run(world_size: int, words: list[str], **more: Any) -> list[dict[str, Any]]:
        return run_distributed(train, world_size=world_size, timeout=240, init=False, words=words, **more)

    def step(
        self, schedule: str, world_size: int, pp: int, ep: int = 1, words: str = "", **more: Any
    ) -> dict[str, Any]:
        given = [
            "--pretrained-checkpoint",
            str(self.folder / "pretrained"),
            "--sft-data",
            str(self.folder / "rows"),
        ]
        given += ["--train-iters", "1", "--calculate-per-token-loss"]
        given += ["--moe-aux-loss-coeff", "0", "--allow-deviation", "moe_aux_loss_coeff"]
        given += ["--pipeline-model-parallel-size", str(pp), "--expert-model-parallel-size", str(ep)]
        given += [*(["--pipeline-schedule", schedule] if schedule != "1f1b" else []), *words.split()]
        ranks = self._run(world_size, [*self.common, *given], **more)
        return {
            "grads": join_tensors([rank["grads"] for rank in ranks], "gradient"),
            "pairs": sum(rank["pairs"] for rank in ranks),
            "padded": [count for rank in ranks for count in rank["padded"]],
        }


@pytest.fixture(scope="module")
def with_mtp(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("mtp"), tokenizer_dir, mtp=1)


@pytest.fixture(scope="module")
def without_mtp(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("plain"), tokenizer_dir, mtp=0)


def check_no_crossing(step: dict[str, Any]) -> None:
    embedding = step["grads"][EMBEDDING]
    touched = set(embedding.abs().sum(dim=1).nonzero().flatten().tolist())
    assert touched and touched <= set(LEARNT), sorted(touched - set(LEARNT))


def check(setup: Setup, step: dict[str, Any]) -> None:
    check_no_crossing(step)
    expected = setup.reference["grads"]
    assert step["grads"].keys() == expected.keys()
    worst = max(expected, key=lambda name: relative_difference(step["grads"][name], expected[name]))
    assert relative_difference(step["grads"][worst], expected[worst]) < 1e-5, worst
    # Each row's padding was told to every router, in the same numbers as without a pipeline.
    assert set(step["padded"]) == set(setup.reference["padded"]) and min(step["padded"]) > 0


def test_one_process(with_mtp: Setup) -> None:
    check_no_crossing(with_mtp.reference)


def test_dropped_boundaries_are_seen(with_mtp: Setup) -> None:
    with pytest.raises(AssertionError):
        check_no_crossing(with_mtp.step("1f1b", world_size=1, pp=1, drop_boundaries=True))


@pytest.mark.parametrize(
    ("schedule", "world_size", "ep", "words"),
    [
        pytest.param("1f1b", 2, 1, "", marks=pytest.mark.slow),
        pytest.param("1f1b", 2, 1, "--num-virtual-stages-per-pipeline-rank 2", marks=pytest.mark.slow),
        pytest.param("zb1p", 4, 2, "", marks=pytest.mark.slow),
        ("dualpipe", 2, 1, ""),
        pytest.param("dualpipev", 2, 1, "", marks=pytest.mark.slow),
        pytest.param("dualpipe", 4, 2, "", marks=pytest.mark.slow),
        pytest.param("zigzag", 2, 1, "", marks=pytest.mark.slow),
        # Chunks in the middle of the model read the boundaries too.
        pytest.param(
            *("zigzag", 2, 1),
            "--pipeline-zigzag-chunks 4 --pipeline-model-parallel-layout Et||t||t||t|mL",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_with_mtp(schedule: str, world_size: int, ep: int, words: str, with_mtp: Setup) -> None:
    """Pairs run one after the other: Megatron's MTP node takes no boundaries."""
    step = with_mtp.step(schedule, world_size, pp=2, ep=ep, words=words)
    check(with_mtp, step)
    assert step["pairs"] == 0


@pytest.mark.parametrize(
    ("schedule", "order"),
    [
        ("dualpipe", "megatron"),
        pytest.param("dualpipe", "report", marks=pytest.mark.slow),
        pytest.param("dualpipev", "megatron", marks=pytest.mark.slow),
        pytest.param("zigzag", "megatron", marks=pytest.mark.slow),
        pytest.param("zb1p", "megatron", marks=pytest.mark.slow),
    ],
)
def test_overlapped_pairs(schedule: str, order: str, without_mtp: Setup) -> None:
    step = without_mtp.step(schedule, 4, pp=2, ep=2, words=f"--pipeline-pair-order {order}")
    check(without_mtp, step)
    assert (step["pairs"] > 0) == (schedule != "zb1p")


@pytest.mark.slow
def test_micro_batches_of_two_rows(with_mtp: Setup) -> None:
    """They are laid side by side; the balance loss takes padding masks of more than one row too."""
    check_no_crossing(with_mtp.step("1f1b", world_size=1, pp=1, words="--micro-batch-size 2"))
    with_mtp.step("1f1b", world_size=1, pp=1, words="--micro-batch-size 2 --moe-aux-loss-coeff 1e-4")


def test_the_model_can_tell(with_mtp: Setup) -> None:
    """The comparison is not between zeros: every kind of weight has a gradient."""
    sizes = {name: float(grad.abs().max()) for name, grad in with_mtp.reference["grads"].items()}
    for part in ("experts", "mtp", "self_attention", "output_layer"):
        assert any(part in name and size > 0 for name, size in sizes.items()), part
    assert torch.isfinite(torch.tensor(list(sizes.values()))).all()
