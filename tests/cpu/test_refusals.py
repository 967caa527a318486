"""Whatever cannot work on CPU is refused by name when a trainer parses its arguments."""

import copy
import sys
from argparse import Namespace
from unittest import mock

import pytest
from megatron.training.arguments import parse_and_validate_args, parse_args

from dsv3_megatron.cpu import CPU_FLAGS
from dsv3_megatron.cpu.refusals import REFUSALS, TE, RefusedOnCpu, check
from tests.cpu.training import GPT

# A value that each row refuses; True where not named.
REFUSED_VALUES = {
    "transformer_impl": "transformer_engine",
    "no_persist_layer_norm": False,
    "fp8": "e4m3",
    "fp4": "e2m1",
    "cuda_graph_impl": "local",
    "moe_token_dispatcher_type": "flex",
    "nccl_communicator_config_path": "nccl.yaml",
    "high_priority_stream_groups": ["ep"],
    "cpu_offloading_num_layers": 1,
}


@pytest.fixture(scope="module")
def parsed_once() -> Namespace:
    with mock.patch.object(sys, "argv", ["pretrain", *GPT, *CPU_FLAGS]):
        return parse_args()


@pytest.fixture
def parsed(parsed_once) -> Namespace:
    return copy.copy(parsed_once)


def test_the_cpu_flags_suffice(parsed):
    check(parsed)


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_each_row_names_argument_value_and_fix(parsed, row):
    assert hasattr(parsed, row.name), "Megatron has no such argument"
    value = REFUSED_VALUES.get(row.name, True)
    setattr(parsed, row.name, value)
    with pytest.raises(RefusedOnCpu) as error:
        check(parsed)
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    for part in (row.flag, repr(value), row.why, row.fix):
        assert part in lines[0]
    if row.why == TE:
        check(parsed, allow_te=True)


def test_background_save_needs_what_runs_here(parsed):
    parsed.async_save = True
    with pytest.raises(RefusedOnCpu, match="--use-persistent-ckpt-worker: add it"):
        check(parsed)
    parsed.use_persistent_ckpt_worker = True
    with pytest.raises(RefusedOnCpu, match=r"nvrx needs nvidia-resiliency-ext.*--async-strategy mcore"):
        check(parsed)
    parsed.async_strategy = "mcore"
    check(parsed)


def test_a_trainer_is_stopped_before_megatron_validates(monkeypatch):
    from megatron.training import arguments

    validated = []
    monkeypatch.setattr(arguments, "validate_args", lambda *args: validated.append(args))
    monkeypatch.setattr(sys, "argv", ["pretrain", *GPT, *CPU_FLAGS[2:], "--moe-grouped-gemm"])
    with pytest.raises(RefusedOnCpu) as error:
        parse_and_validate_args()
    assert not validated
    assert "--transformer-impl" in str(error.value) and "--moe-grouped-gemm" in str(error.value)
