"""Fixtures of the specs' tests that these share."""

from tests.specs.conftest import single_rank

__all__ = ["single_rank"]
