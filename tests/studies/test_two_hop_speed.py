"""The hops run beside each other in chunks, and one after the other without."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_sees_chunks():
    """Short sleeps and wide bounds: the machine may be busy. `make bench-dispatch` has long ones."""
    command = [
        sys.executable,
        "-m",
        "dsv3_megatron.studies.two_hop_speed",
        "--seconds",
        "0.8",
        "--repeats",
        "2",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ratio = {(line["case"], line["links"], line["chunks"]): line["ratio"] for line in lines}
    assert len(ratio) == 12
    for case in ("dispatch", "combine"):
        for links in ("infiniband slower", "even", "nvlink slower"):
            one, ten = ratio[case, links, 1], ratio[case, links, 10]
            assert one > 1.3 and 1 <= ten < one - 0.1, (case, links)
