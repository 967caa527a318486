"""Test configuration: the CPU runtime is active in the pytest process as it is in the ranks of the harness."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.harness.runtime import activate_runtime

activate_runtime()
