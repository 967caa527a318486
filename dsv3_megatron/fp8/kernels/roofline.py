"""The least time that a step can take on an H100, from what it must read, write and multiply.

Bytes are those of a function's arguments and results, each once, whatever the kernel really moves; FLOPs are those of
the tensor cores. What other arithmetic there is hides behind the memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_leaves

from dsv3_megatron.fp8.kernels.cases import Case
from dsv3_megatron.fp8.kernels.launch import Launch, recording

__all__ = ["BYTES_PER_SECOND", "FLOPS_PER_SECOND", "Roofline", "per_kernel", "table"]

BYTES_PER_SECOND = 3.0e12  # of HBM3's 3.35e12, what a copy reaches
FLOPS_PER_SECOND = 1979e12  # dense FP8


@dataclass(frozen=True)
class Roofline:
    """What a case moves and multiplies.

    Attributes:
        case: its name.
        bytes: read and written.
        flops: of the tensor cores, FP8.
    """

    case: str
    bytes: int
    flops: int

    @property
    def floor_us(self) -> float:
        """Least time in µs: the longer of moving and multiplying."""
        return 1e6 * max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)

    @property
    def bound(self) -> str:
        return "memory" if self.bytes / BYTES_PER_SECOND >= self.flops / FLOPS_PER_SECOND else "products"


def of(case: Case) -> tuple[Roofline, list[Launch]]:
    """The case's roofline, and the launches that it makes; its tensors are on the meta device."""
    launches: list[Launch] = []
    with recording(launches.append):
        results = case.call()
    arguments = (case.call.args, case.call.keywords)
    storages = {
        t.untyped_storage()._cdata: t for t in tree_leaves((arguments, results)) if isinstance(t, Tensor)
    }
    return Roofline(case.name, sum(t.nbytes for t in storages.values()), case.flops), launches


def per_kernel(cases: Iterable[Case]) -> dict[str, Roofline]:
    """For each kernel the case of the highest floor; fp32 matrices are left out, since training has them in bf16."""
    highest: dict[str, Roofline] = {}
    for case in cases:
        if "float32" in case.name:
            continue
        roofline, launches = of(case)
        for launch in launches:
            name = launch.name
            if name not in highest or roofline.floor_us > highest[name].floor_us:
                highest[name] = roofline
    return highest


def table(rooflines: dict[str, Roofline]) -> list[str]:
    """Lines of text, the header first."""
    lines = [f"{'kernel':<24} {'MB':>7} {'GFLOP':>7} {'floor us':>9}  {'bound by':<9} largest case"]
    for kernel, r in sorted(rooflines.items()):
        lines.append(
            f"{kernel:<24} {r.bytes / 1e6:>7.1f} {r.flops / 1e9:>7.0f} {r.floor_us:>9.1f}  {r.bound:<9} {r.case}"
        )
    return lines
