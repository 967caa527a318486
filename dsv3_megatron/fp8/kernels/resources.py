"""What a compiled kernel needs of an SM, read from its cubin and its PTX."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

HOPPER_SHARED_BYTES = 227 * 1024  # what one block may use on sm_90
# FP8 operands on both sides and an fp32 accumulator (DeepSeek-V3 report §3.3.2).
FP8_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3")


@dataclass(frozen=True)
class Resources:
    """registers per thread; spilled and shared memory in bytes, per thread and per block."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    fp8_wgmma: int

    def problems(self, expects_wgmma: bool) -> list[str]:
        """Why this kernel must not ship; empty when it may."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes per thread")
        if self.shared_bytes > HOPPER_SHARED_BYTES:
            found.append(
                f"needs {self.shared_bytes} bytes of shared memory, Hopper has {HOPPER_SHARED_BYTES}"
            )
        if expects_wgmma and not self.fp8_wgmma:
            found.append("has no wgmma with e4m3 operands")
        return found


def read_resources(cubin: Path) -> Resources:
    """Registers and local memory from the cubin through `cuobjdump`, wgmma instructions from the PTX beside it.

    Triton uses local memory for nothing but spilled registers, so stack and local bytes are the spills. Shared memory
    is given at launch and thus no property of the cubin: Triton's count is in the JSON beside it.

    Raises:
        RuntimeError: cuobjdump printed something else than it does today.
    """
    command = [_cuobjdump(), "--dump-resource-usage", str(cubin)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    if set(usage) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"{' '.join(command)} names no REG, STACK and LOCAL:\n{dump}")
    return Resources(
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=json.loads(cubin.with_suffix(".json").read_text())["shared"],
        fp8_wgmma=len(FP8_WGMMA.findall(cubin.with_suffix(".ptx").read_text())),
    )


def _cuobjdump() -> str:
    """The program that Triton's wheel brings along, or the one that its environment variable names."""
    knobs = getattr(triton, "knobs", None)  # came with Triton 3.4
    if knobs is not None:
        return str(knobs.nvidia.cuobjdump.path)
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
