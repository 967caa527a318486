"""Reading curves back, the summary, progress lines, and settings of a run folder."""

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from dsv3_megatron.demo.corpus import read_tokens, standard_library_files
from dsv3_megatron.demo.launch import progress_printer
from dsv3_megatron.demo.results import layer_expert_loads, read_curves, summarise
from dsv3_megatron.demo.run import DemoSettings, run_demo, saved_iteration


def test_repeated_iterations_take_the_later_value(tmp_path):
    for values, start in (([5.0, 4.0, 3.0], 1), ([2.5, 2.0], 3)):  # the second run repeats iteration 3
        with SummaryWriter(str(tmp_path)) as writer:
            for step, value in enumerate(values, start):
                writer.add_scalar("lm loss", value, step)
    assert read_curves(tmp_path) == {"lm loss": {1: 5.0, 2: 4.0, 3: 2.5, 4: 2.0}}


def curves_for(last: int) -> dict[str, dict[int, float]]:
    return {
        "held-out loss": {50: 6.0, last: 4.0},
        "held-out loss, context shuffled": {last: 4.5},
        "dsv3/mtp_loss": {i: float(i) for i in range(1, last + 1)},
        # what comes before the resume is not of this run
        "dsv3/tokens_per_s": {i: 9.0 if i <= 50 else 2000.0 for i in range(2, last + 1)},
        "dsv3/max_over_mean_expert_load": {i: 0.0 if i <= last - 20 else 2.5 for i in range(1, last + 1)},
        "experts-max_over_mean/layer_01": dict.fromkeys(range(1, last + 1), 2.5),
    }


def test_summary():
    assert summarise(curves_for(100), 6.5, iteration=100, resumed_from=50) == {
        "val_loss": 4.0,
        "unigram_loss": 6.5,
        "shuffled_context_loss": 4.5,
        "mtp_loss": sum(range(81, 101)) / 20,
        "tokens_per_s": 2000.0,
        "max_over_mean_expert_load": 2.5,
        "iteration": 100,
        "resumed_from": 50,
    }
    assert list(layer_expert_loads(curves_for(100))) == ["layer_01"]


@pytest.mark.parametrize("tag", sorted(set(curves_for(100)) - {"experts-max_over_mean/layer_01"}))
def test_summary_refuses_figures_of_another_iteration(tag):
    curves = curves_for(100)
    curves[tag] = {i + 100: value for i, value in curves[tag].items()}
    with pytest.raises(LookupError, match=f"'{tag}' was not logged"):
        summarise(curves, 6.5, iteration=100, resumed_from=50)


def test_progress_line():
    lines: list[str] = []
    show = progress_printer(lines.append)
    for iteration in (19, 20):
        show(
            f" [2025-01-01 00:00:00.000000] iteration {iteration:8d}/{240:8d} | consumed samples: 320 |"
            " elapsed time per iteration (ms): 450.0 | learning rate: 3.000000E-03 | global batch size: 16 |"
            " lm loss: 5.123400E+00 | mtp_1 loss: 6.500000E+00 | loss scale: 1.0 | grad norm: 1.000 |"
        )
    show("[demo] held-out loss 5.0000")
    show("anything else")
    assert lines == [
        "[demo] iteration 20/240  loss 5.123  MTP loss 6.500  0.45 s/iteration, ETA 99 s",
        "[demo] held-out loss 5.0000",
    ]


def test_corpus_is_the_same_each_time_and_without_tests():
    files = standard_library_files(1_000_000)
    assert files == standard_library_files(1_000_000)
    total = sum(path.stat().st_size for path in files)
    assert 700_000 < total <= 1_000_000
    assert not {"test", "tests", "site-packages"} & {part for path in files for part in path.parts}
    assert set(files) < set(standard_library_files(2_000_000))


def test_missing_library_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source files"):
        standard_library_files(1000, tmp_path)


def test_read_tokens_is_what_megatron_reads(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from dsv3_megatron.data.prepare import PrepareSettings, prepare

    files = standard_library_files(300_000)
    prepare(files, tmp_path, PrepareSettings(vocab_size=300))
    dataset = IndexedDataset(str(tmp_path / "train"))
    np.testing.assert_array_equal(
        read_tokens(tmp_path, "train"), np.concatenate([dataset[i] for i in range(len(dataset))])
    )


@pytest.mark.parametrize("num_windows", [8, 20])
def test_too_few_or_uneven_windows_are_refused_before_training(num_windows: int, tmp_path) -> None:
    """DualPipe's 4 replicas of 2 windows each, and 2 microbatches in each direction."""
    with pytest.raises(ValueError, match=f"--num-windows {num_windows}: .* multiple of 8 .* at least 16"):
        run_demo(tmp_path, DemoSettings(num_windows=num_windows), more_iters=10)
    assert not (tmp_path / "corpus").exists()


def test_folder_of_other_settings_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert saved_iteration(tmp_path / "checkpoints") == 0
    (tmp_path / "settings.json").write_text('{"train_iters": 100}')
    with pytest.raises(ValueError, match="train_iters 100 there, 200 asked"):
        run_demo(tmp_path, DemoSettings(), more_iters=10)
