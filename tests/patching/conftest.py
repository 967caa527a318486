"""Megatron on one rank, as the model's tests have it."""

from tests.specs.conftest import single_rank

__all__ = ["single_rank"]
