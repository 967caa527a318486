"""What the machine has, read by the doctor: recorded, and judged where something needed is missing."""

from collections.abc import Callable

import pytest
import torch

from dsv3_megatron import doctor
from dsv3_megatron.arguments.requirements import TE
from tests.gpu import device
from tests.gpu.test_shared_gpu import carrier

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]


def test_versions(record_property: Record) -> None:
    """Every line of `dsv3 doctor`; TE, Apex and DeepEP may be absent, what trains may not."""
    findings = doctor.examine()
    for finding in findings:
        record_property(
            finding.name, f"{finding.found} ({finding.state})" if finding.found else finding.state
        )
    needed = [finding for finding in findings if finding.name != TE]  # without it, stage 4 alone is skipped
    lacking = [f"{f.name}: {f.hint or f.found}" for f in needed if f.state in ("missing", "wrong")]
    record_property("lacking", "; ".join(lacking) or "nothing")
    assert not lacking


def test_the_gpu(record_property: Record) -> None:
    record_property("gpu", device.gpu_name())
    record_property("capability", str(torch.cuda.get_device_capability(0)))
    record_property("shared_by", carrier(None if device.REHEARSAL else torch.cuda.nccl.version())[0])
    assert torch.cuda.get_device_capability(0) >= (9, 0), "E4M3 with block scales needs Hopper"


def test_arithmetic_of_the_device() -> None:
    """fp32 products are not tf32 where references are computed: within 1e-5 of float64."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    product = (a.to(device.DEVICE) @ b.to(device.DEVICE)).cpu().double()
    exact = a.double() @ b.double()
    assert float((product - exact).norm() / exact.norm()) < 1e-5
