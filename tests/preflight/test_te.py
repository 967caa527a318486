"""With Transformer Engine installed, the check builds its modules, as the job would."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.te

BUILD = """
import collections, os
from dsv3_megatron.preflight.machine import Machine
from dsv3_megatron.preflight.start import become
become(Machine())
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
from dsv3_megatron.dryrun.world import FakeWorld
built = collections.Counter()
build = FakeWorld.build_chunks
def count(self, position=None):
    chunks = build(self, position)
    kinds = {base for chunk in chunks for module in chunk.modules() for base in type(module).__mro__}
    built.update(base.__module__.partition(".")[0] for base in kinds)
    return chunks
FakeWorld.build_chunks = count
from dsv3_megatron.preflight.check import examine
from dsv3_megatron.preflight.findings import ok
from dsv3_megatron.preflight.line import read
line = "-m dsv3_megatron.train_hydra model=v3_671b layout=pp16_ep64 global_batch_size=15360"
found = examine(read(line.split()), Machine())
print(*found, sep="\\n")
assert ok(found) and not any(f.argument == "transformer-engine" for f in found)
assert built["transformer_engine"] >= 4, built
"""


def test_its_modules_are_built() -> None:
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_the_table_agrees_with_what_is_installed() -> None:
    """Asked for its symbols, the installed version lacks what the table says of its version."""
    from dsv3_megatron.arguments.requirements import TE, installed_version, lacking

    assert lacking(TE) == lacking(TE, installed_version(TE))
