"""Run test functions on several ranks, quickly: see `pool.run_distributed`."""

from tests.harness.pool import DistributedFailure, run_distributed

__all__ = ["DistributedFailure", "run_distributed"]
