"""What is refused before a model is built, of the data's own numbers and of places that are to be written."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.arguments.command_line import parse_given
from dsv3_megatron.arguments.options import wrong_numbers
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.posttrain.arguments import check as check_posttrain
from dsv3_megatron.sft.arguments import check as check_sft

REPORT = {"seq_length": 64, "train": {"rows": 8, "pairs": 8}, "valid": {"rows": 0, "pairs": 0}}


def given(folder: Path, **changes: Any) -> Namespace:
    fixed = {
        "posttrain": "dpo",
        "preference_data": str(folder),
        "preference_epochs": 1,
        "sft_data": str(folder),
        "sft_epochs": 1,
        "seq_length": 64,
        "global_batch_size": 4,
        "eval_iters": 0,
        "dpo_beta": 0.1,
        "dpo_label_smoothing": 0.0,
        "dpo_reference": "cached",
        "dpo_reference_dir": None,
    }
    for name in ("preferences.json", "sft.json"):
        (folder / name).write_text(json.dumps(REPORT))
    return Namespace(**{**fixed, **changes})


@pytest.mark.parametrize("check", [check_posttrain, check_sft])
def test_evaluation_needs_held_out_rows(check: Any, tmp_path: Path) -> None:
    check(given(tmp_path))
    with pytest.raises(RefusedArgument, match=r"^--eval-iters 2: .* has no held-out .*--valid-fraction$"):
        check(given(tmp_path, eval_iters=2))


def test_a_reference_that_could_not_be_written_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RefusedArgument, match=r"^--dpo-reference-dir .*file/below: .* cannot write there"):
        check_posttrain(given(tmp_path, dpo_reference_dir=str(file / "below")))
    check_posttrain(given(tmp_path, dpo_reference_dir=str(file / "below"), dpo_reference="live"))
    check_posttrain(given(tmp_path, dpo_reference_dir=str(tmp_path / "new" / "below")))


def test_a_reference_may_stay_and_a_bad_reward_be_below_0() -> None:
    parser = megatron_parser()
    assert not wrong_numbers(parse_given(parser, ["--renew-reference", "0", "--bad-reward=-1"]), parser)
    (message,) = wrong_numbers(parse_given(parser, ["--bad-reward", "nan"]), parser)
    assert message.startswith("--bad-reward nan: ")
