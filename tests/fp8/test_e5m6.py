"""E5M6 against its definition: every code, every midpoint, packing, and what is not a usual number."""

import math

import numpy as np
import pytest
import torch

from dsv3_megatron.fp8 import decode_e5m6, encode_e5m6, pack_e5m6, unpack_e5m6
from tests.fp8 import independent
from tests.fp8.test_tiles import matrix

CODES = torch.arange(4096)


def test_every_code_is_a_number_of_the_definition() -> None:
    magnitude = np.append(independent.E5M6, np.nan)
    np.testing.assert_array_equal(decode_e5m6(CODES).numpy(), np.concatenate([magnitude, -magnitude]))
    assert independent.E5M6[-1] == 129024 and independent.E5M6[1] == 2**-20


def test_every_code_survives() -> None:
    assert torch.equal(encode_e5m6(decode_e5m6(CODES)).int(), CODES.int())


def test_every_code_survives_packing() -> None:
    finite = decode_e5m6(CODES[(CODES & 0x7FF) != 0x7FF])
    x = torch.cat(
        [torch.full((len(finite), 1), independent.E5M6[-1]), finite[:, None]], 1
    )  # scale 1 in each row
    packed, scale = pack_e5m6(x)
    assert packed.shape == (4094, 3) and packed.dtype == torch.uint8 and (scale == 1).all()
    assert torch.equal(unpack_e5m6(packed, scale), x)


def test_layout_of_the_bytes() -> None:
    """The largest number is 0x7FE, −1 is 0xBC0: FE 07|0 BC."""
    packed, _ = pack_e5m6(torch.tensor([[129024.0, -1.0]]))
    assert packed.tolist() == [[0xFE, 0x07, 0xBC]]


def test_rounding_at_and_beside_every_midpoint() -> None:
    grid = independent.E5M6
    middle = ((grid[:-1] + grid[1:]) / 2).astype(np.float32)
    x = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    x = np.concatenate([x, -x])
    expected = independent.nearest_code(x, grid) + np.where(np.signbit(x), 0x800, 0)
    np.testing.assert_array_equal(encode_e5m6(torch.tensor(x)).int().numpy(), expected)


def test_beyond_the_largest_and_not_finite() -> None:
    x = torch.tensor([130048.0, 1e30, -1e30, math.inf, -math.inf, math.nan, -0.0])
    codes = encode_e5m6(x).int().tolist()
    assert codes[:3] == [0x7FE, 0x7FE, 0xFFE] and codes[6] == 0x800
    assert all(code & 0x7FF == 0x7FF for code in codes[3:6])


@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (3, 129), (4, 300), (0, 10)])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e20])
def test_equals_the_definition(shape: tuple[int, int], scale: float) -> None:
    x = matrix(shape, scale=scale)
    packed, scales = pack_e5m6(x)
    assert packed.shape == (shape[0], 3 * math.ceil(shape[1] / 2))
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    np.testing.assert_array_equal(
        unpack_e5m6(packed, scales, shape[1]).double().numpy(), independent.e5m6(x.numpy())
    )


def test_zeros_denormals_nan() -> None:
    packed, scale = pack_e5m6(torch.zeros(2, 130))
    assert (packed == 0).all() and (scale == 1).all()
    x = torch.tensor([[1e-40, -2e-39]])
    values = unpack_e5m6(*pack_e5m6(x))
    torch.testing.assert_close(values, x, rtol=1 / 128, atol=0)
    x = torch.tensor([[math.nan, 2.0, math.inf, 3.0]])
    values = unpack_e5m6(*pack_e5m6(x))
    assert values[0, [0, 2]].isnan().all() and values[0, [1, 3]].tolist() == [2, 3]
