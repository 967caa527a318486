"""How far two results are apart. What is not a number is infinitely far, so that no bound lets it pass."""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["largest", "norm", "number"]


def largest(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """max |a − b| / max |a|, or / `scale`; 0 where both are zero, infinite where either has what is no number, or the
    shapes differ."""
    if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return _quotient(
        float((a.float() - b.float()).abs().max()), float(a.abs().max()) if scale is None else scale
    )


def norm(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, in double precision; 0 where both are zero, infinite where either has what is no number, or the
    shapes differ."""
    if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()):
        return math.inf
    a, b = a.double(), b.double()
    return _quotient(float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(b)))


def number(a: Any, b: Any) -> float:
    """|a − b| / max(|a|, |b|); infinite where one is missing or no number."""
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a is None and b is None else math.inf
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def _quotient(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size and math.isfinite(size) else math.inf
