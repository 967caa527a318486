"""Unmodified Megatron trains on CPU, and what should not change the numbers does not."""

from pathlib import Path

import pytest
import torch

from tests.cpu.training import MOE, pretrain_without_waits, train

DISTRIBUTED = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
MERGED = [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2", "--bf16", *DISTRIBUTED, *MOE]


def floats(steps: list) -> torch.Tensor:
    """(steps, 2): loss and gradient norm."""
    return torch.tensor([[float(value) for value in step] for step in steps], dtype=torch.float64)


def test_overlap_and_data_workers_change_nothing(tmp_path):
    plain, _ = train(tmp_path / "plain", 2, *DISTRIBUTED)
    other, ranks = train(tmp_path / "other", 2, *DISTRIBUTED, *OVERLAP, "--num-workers", "1", record=True)
    assert len(plain) == 4 and float(plain[-1][0]) < float(plain[0][0])
    assert other == plain
    assert all(rank["violations"] == [] and rank["num_operations"][-1] > 1000 for rank in ranks)


def test_recomputation_draws_the_same_dropout(tmp_path):
    """A recomputed forward must find the random state of the first one, in all trackers."""
    dropout = ["--attention-dropout", "0.2", "--hidden-dropout", "0.2"]
    plain, _ = train(tmp_path / "plain", 1, *dropout)
    again, _ = train(
        tmp_path / "again", 1, *dropout, "--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", "1",
    )  # fmt: skip
    without, _ = train(tmp_path / "without", 1)
    assert again == plain != without


def test_sequence_parallel(tmp_path):
    """Norms see a part of the sequence: without the sum of their gradients the norms would differ."""
    same_weights = ["--use-cpu-initialization", "--vocab-size", "255"]
    whole, _ = train(tmp_path / "tp1", 1, *same_weights, *DISTRIBUTED)
    parts, _ = train(
        tmp_path / "tp2", 2, *same_weights, *DISTRIBUTED, "--tensor-model-parallel-size", "2",
        "--sequence-parallel",
    )  # fmt: skip
    torch.testing.assert_close(floats(parts), floats(whole), rtol=1e-3, atol=0)
    assert floats(whole)[:, 1].std() > 1e-3


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory) -> torch.Tensor:
    steps, _ = train(tmp_path_factory.mktemp("interleaved"), 4, *MERGED)
    return floats(steps)


def test_merged_schedule(tmp_path, interleaved):
    """Megatron's layer-wise merged forward and backward, on two streams, waits wherever it must."""
    steps, ranks = train(tmp_path, 4, *MERGED, *OVERLAP, "--overlap-moe-expert-parallel-comm", record=True)
    torch.testing.assert_close(floats(steps), interleaved, rtol=5e-3, atol=0)
    for rank in ranks:
        assert rank["violations"] == []
        assert len(rank["num_operations"]) > 1 and rank["num_operations"][-2] > 20


def test_merged_schedule_without_waits_is_reported(tmp_path, interleaved):
    words = [*MERGED, "--overlap-moe-expert-parallel-comm", "--train-iters", "1"]
    steps, ranks = train(tmp_path, 4, *words, fn=pretrain_without_waits)
    assert all("does not wait for" in rank["violations"][0] for rank in ranks)
    # The numbers alone would have shown nothing: here work runs in issue order.
    torch.testing.assert_close(floats(steps), interleaved[:1], rtol=5e-3, atol=0)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a `torch_dist` checkpoint, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_equal_checkpoints(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys() and len(left) > 10
    for key in left:
        # NaN is padding between the optimizer's parameters, which is never written.
        assert left[key].isfinite().float().mean() > 0.9, key
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0, equal_nan=True, msg=key)


def test_background_save_keeps_what_it_was_given():
    """The worker writes when it gets to it; the tensors it was given are being trained meanwhile."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    moment = torch.ones(4)
    [(path, key, (data, [(item, staged)]))] = FileSystemWriterAsync.preload_tensors(
        [("folder/file", "file", ([("item", "bytes")], [("item", moment)]))]
    )
    moment += 1
    assert (path, key, data, item) == ("folder/file", "file", [("item", "bytes")], "item")
    assert staged.eq(1).all()


@pytest.mark.slow  # by default tests/parallel/test_resume.py, and the test above of what a background save keeps
@pytest.mark.parametrize("optimizer_format", ["dp_reshardable", "fully_reshardable"])
def test_resume_is_bit_equal(tmp_path, optimizer_format):
    """4 steps = 2 steps, save, load, 2 steps: weights and moments; saved in the background equals saved."""
    common = [*DISTRIBUTED, *MOE, "--ckpt-format", "torch_dist", "--save-interval", "2"]
    if optimizer_format == "fully_reshardable":
        common += ["--dist-ckpt-optim-fully-reshardable", "--ckpt-fully-parallel-load"]
    background = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    first, second = tmp_path / "first", tmp_path / "second"
    whole, _ = train(tmp_path / "log1", 2, *common, "--save", str(first), *background, fill=True)
    (first / "latest_checkpointed_iteration.txt").write_text("2")
    resumed, _ = train(tmp_path / "log2", 2, *common, "--load", str(first), "--save", str(second), fill=True)
    # Megatron's second line after a start is the mean of two steps.
    assert len(resumed) == 2 and resumed[0] == whole[2]
    assert_equal_checkpoints(second / "iter_0000004", first / "iter_0000004")
    moments = [key for key in tensors_of(first / "iter_0000004") if "exp_avg" in key]
    assert moments
    with pytest.raises(AssertionError):
        assert_equal_checkpoints(first / "iter_0000002", first / "iter_0000004")


def test_rerun_state_machine(tmp_path):
    """An injected wrong result is found, the step is run again, and the job asks to be started elsewhere."""
    words = ["--error-injection-rate", "1", "--error-injection-type", "transient_error", "--train-iters", "2"]
    _, ranks = train(tmp_path, 1, *words)
    assert ranks[0]["exit_code"] in (16, 17)
    assert "rerun" in (tmp_path / "rank0.log").read_text().lower()
