"""E4M3, E5M6 and their tiles written down a second time: NumPy, float64, every number from its definition."""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """Numbers of the codes without sign, in order; the last code is NaN and left out."""
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - 1):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        if exponent:
            values.append((1 + fraction) * 2.0 ** (exponent - bias))
        else:
            values.append(fraction * 2.0 ** (1 - bias))
    return np.array(values)


E4M3 = magnitudes(4, 3, 7)
E5M6 = magnitudes(5, 6, 15)


def nearest_code(x: Array, grid: Array) -> Array:
    """Code (without sign) of the number in `grid` nearest to |x|; of two equally near the even code."""
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    below = above - 1
    to_above, to_below = grid[above] - size, size - grid[below]
    even = np.where(above % 2 == 0, above, below)
    return np.where(to_above < to_below, above, np.where(to_below < to_above, below, even))


def rounded(x: Array, grid: Array) -> Array:
    return np.sign(x) * grid[nearest_code(x, grid)]


def tile(x: Array, rows: int, columns: int, eps: float = 1e-4, pow2: bool = False) -> Array:
    """x [M, K], quantised to E4M3 by tiles of rows×columns and dequantised, float64. Finite numbers only."""
    return _by_tiles(x, rows, columns, lambda part: _quantised(part, eps, pow2))


def e5m6(x: Array) -> Array:
    """x [M, K] by 1×128 tiles in E5M6, float64."""

    def quantised(part: Array) -> Array:
        amax = np.abs(part).max()
        scale = _power_of_two(float(np.float32(amax) / np.float32(E5M6[-1]))) if amax else 1.0
        return rounded(part.astype(np.float64) / scale, E5M6) * scale

    return _by_tiles(x, 1, 128, quantised)


def swiglu(u: Array, weights: Array | None) -> Array:
    gate, up = np.split(u.astype(np.float64), 2, axis=1)
    hidden = gate / (1 + np.exp(-gate)) * up
    return hidden if weights is None else hidden * weights


def _by_tiles(x: Array, rows: int, columns: int, quantised: Callable[[Array], Array]) -> Array:
    result = np.empty(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            result[i : i + rows, j : j + columns] = quantised(x[i : i + rows, j : j + columns])
    return result


def _quantised(part: Array, eps: float, pow2: bool) -> Array:
    part = part.astype(np.float32)
    amax = np.float32(max(np.abs(part).max(), np.float32(eps)))
    scale = amax / np.float32(448) if amax else np.float32(1)
    if pow2:
        scale = np.float32(_power_of_two(float(scale)))
    return rounded(part / scale, E4M3) * float(scale)


def _power_of_two(x: float) -> float:
    """The smallest power of two ≥ x."""
    mantissa, exponent = np.frexp(x)
    return float(np.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))
