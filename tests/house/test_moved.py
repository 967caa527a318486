"""Names under which scripts know a module go on working, run or imported."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_megatron
from dsv3_megatron.moved import ADDRESSES, new_name

RUN = {
    "convert.bench": "usage",
    "demo.throughput": "usage",
    "ema.bench": "usage",
    "fp8.accumulation": "usage",
    "fp8.bench": "usage",
    "fp8.study": "usage",
    "longctx": "usage",
    "optimizer.study": "usage",
    "pipeline.bench": "usage",
    "recipe.memory": "recomputing",
    "recipe.ranks": "phases of a batch ramp",
    "recipe.show": "output=json",
    "sft.demo": "usage",
}


@pytest.mark.parametrize("old", ADDRESSES)
def test_the_new_place_exists_and_the_old_one_is_empty(old):
    assert importlib.util.find_spec(f"dsv3_megatron.{ADDRESSES[old]}") is not None
    path = Path(dsv3_megatron.__path__[0], *old.split("."))
    assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()


@pytest.mark.parametrize(
    "old", ["pipeline.p2p", "specs.linear", "fp8.recipe", "conf.placement", "longctx.needles"]
)
def test_an_old_name_is_the_same_module(old):
    new = new_name(f"dsv3_megatron.{old}")
    assert new is not None
    module = importlib.import_module(f"dsv3_megatron.{old}")
    assert module is importlib.import_module(new)
    assert module.__name__ == new and module.__spec__ is not None and module.__spec__.name == new


@pytest.mark.parametrize("name", ["dsv3_megatron", "dsv3_megatron.fp8", "dsv3_megatron.fp8.benches", "torch"])
def test_other_names_are_left_alone(name):
    assert new_name(name) is None


def test_a_name_that_is_nowhere_is_still_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"dsv3_megatron\.longctx\.nowhere"):
        importlib.import_module("dsv3_megatron.longctx.nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("old", RUN)
def test_an_old_command_runs(old):
    command = [sys.executable, "-m", f"dsv3_megatron.{old}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert RUN[old] in result.stdout
