"""The E5M6 kernels against the reference, bit for bit, in the interpreter."""

import pytest
import torch

from dsv3_megatron import fp8
from tests.fp8.kernels.agreement import KINDS, assert_e5m6, assert_unpacks, example
from tests.fp8.kernels.interpreter import Interpreter


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_shapes(interpreted: Interpreter, kind: str) -> None:
    for seed, (rows, columns) in enumerate(((1, 1), (17, 127), (3, 130), (20, 300))):
        assert_e5m6(interpreted, example(kind, rows, columns, seed=seed))
    assert_e5m6(interpreted, example(kind, 5, 256, torch.bfloat16))


def test_every_code(interpreted: Interpreter) -> None:
    """All 4096 codes, decoded, and encoded again at scale 1 wherever they are numbers."""
    codes = torch.arange(4096).view(-1, 2)
    a, b = codes.unbind(1)
    packed = torch.stack([a & 255, (a >> 8) | ((b & 15) << 4), b >> 4], 1).to(torch.uint8).view(32, 192)
    assert_unpacks(interpreted, packed, torch.ones(32, 1), 128)
    # Tiles that hold the largest number have scale 1, so that every code must come back.
    values = fp8.decode_e5m6(torch.arange(4096)).view(-1, 64)
    x = torch.cat([values, torch.full_like(values, 129024.0)], 1)
    actual, scale = interpreted("pack_e5m6", x)
    assert torch.equal(scale, torch.ones(64, 1))
    assert torch.equal(actual[:, :96].reshape(-1), packed.view(64, 96).reshape(-1))
    assert_e5m6(interpreted, x)


def test_halfway_goes_to_even(interpreted: Interpreter) -> None:
    values = fp8.decode_e5m6(torch.arange(0x7FF))
    middles = ((values[1:] + values[:-1]) / 2)[:2032].view(16, 127)
    x = torch.cat([middles, torch.full((16, 1), 129024.0)], 1)
    assert_e5m6(interpreted, x)
    assert_e5m6(interpreted, -x)


def test_refuses_shapes_that_do_not_fit(interpreted: Interpreter) -> None:
    packed, scale = fp8.pack_e5m6(torch.ones(4, 200))
    with pytest.raises(ValueError, match="num_columns=300"):
        interpreted("unpack_e5m6", packed, scale, 300)
    with pytest.raises(ValueError, match="two numbers fill three bytes"):
        interpreted("unpack_e5m6", packed[:, :-1], scale)
