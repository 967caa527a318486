"""Test configuration: the CPU runtime is active in the pytest process as it is in the ranks of the harness."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.harness.runtime import activate_runtime, forget_the_trainer

activate_runtime()
# How long an example takes says what else the machine does.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def untouched_globals() -> Iterator[None]:
    """Whatever order tests run in, each begins without the arguments of a trainer that an earlier one started."""
    yield
    forget_the_trainer()
