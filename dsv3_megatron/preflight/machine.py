"""The machines that a job is meant for, as data: what is installed here, unless it is said otherwise."""

import importlib.metadata
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsv3_megatron.arguments import requirements
from dsv3_megatron.arguments.requirements import CUDA, CUDNN, TE, TORCH, lacking
from dsv3_megatron.arguments.surroundings import Surroundings, max_connections
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.fp8.te_recipe import has_fp32_scales


class Gpu(NamedTuple):
    """What Megatron and the checks ask of a GPU: compute capability, memory in GB."""

    capability: tuple[int, int]
    memory_gb: float


GPUS = {
    "a100": Gpu((8, 0), 80),
    "h100": Gpu((9, 0), 80),
    "h800": Gpu((9, 0), 80),
    "h200": Gpu((9, 0), 141),
    "h20": Gpu((9, 0), 96),
    "b200": Gpu((10, 0), 180),
    "b300": Gpu((10, 3), 288),
    "gb200": Gpu((10, 0), 186),
    "gb300": Gpu((10, 3), 288),
}

EXAMPLES = {"te": "2.12", "torch": "2.14", "cuda": "13.0", "cudnn": "9.24"}

USAGE = {
    "te": "Transformer Engine: absent, or a version; default: as installed here",
    "apex": "NVIDIA's Apex: present or absent; default: as installed here",
    "torch": "version; default: as installed here",
    "cuda": "version that torch was built for; default: as here, 13.0 for a torch without CUDA",
    "cudnn": "version; default: as here",
    "deepep": "DeepEP: present or absent; default: as installed here",
    "gpu": f"{', '.join(GPUS)}; default h100",
    "nodes": "machines of the job; default: as the launch line says",
    "gpus_per_node": "GPUs of each; default: as the launch line says, else 8",
    "host_memory": "GB of each machine; default: unknown",
}


@dataclass(frozen=True)
class Machine:
    """What was said of the machine; an empty string or None means: as it is here.

    Attributes:
        te, apex, torch, cuda, cudnn, deepep, gpu: as in `USAGE`.
        nodes, gpus_per_node: size of the job.
        host_memory: GB of each machine.
    """

    te: str = ""
    apex: str = ""
    torch: str = ""
    cuda: str = ""
    cudnn: str = ""
    deepep: str = ""
    gpu: str = "h100"
    nodes: int | None = None
    gpus_per_node: int | None = None
    host_memory: float | None = None
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @classmethod
    def of(cls, words: Mapping[str, str]) -> "Machine":
        """From `NAME=VALUE` words.

        Raises:
            RefusedArgument: a value that is none.
        """
        values: dict[str, Any] = dict(words)
        for name in ("nodes", "gpus_per_node"):
            if name in values:
                if not values[name].isdecimal() or int(values[name]) < 1:
                    raise RefusedArgument(f"{name}={values[name]}: no count. Use a whole number from 1 on")
                values[name] = int(values[name])
        if "host_memory" in values:
            try:
                memory = float(values["host_memory"])
            except ValueError:
                memory = 0.0
            if not 0 < memory < math.inf:
                raise RefusedArgument(
                    f"host_memory={values['host_memory']}: no GB of a machine. Use a number above 0"
                )
            values["host_memory"] = memory
        for name in ("apex", "deepep"):
            if values.get(name, "present") not in ("present", "absent"):
                raise RefusedArgument(
                    f"{name}={values[name]}: neither of the two. Use {name}=present or {name}=absent"
                )
        if values.get("gpu", "h100") not in GPUS:
            raise RefusedArgument(f"gpu={values['gpu']}: no such GPU here. Use gpu={' or gpu='.join(GPUS)}")
        for name in ("te", "torch", "cuda", "cudnn"):
            absent = " or te=absent" if name == "te" else ""
            if name not in values or (absent and values[name] == "absent"):
                continue
            if not requirements.version_key(values[name]):
                raise RefusedArgument(
                    f"{name}={values[name]}: no version. Use a number such as {name}={EXAMPLES[name]}{absent}"
                )
        return cls(**values)

    def has_te(self) -> bool:
        """Whether the job has Transformer Engine."""
        return self.te != "absent" and (bool(self.te) or te_here() is not None)

    def te_version(self) -> str | None:
        """Its version, None without."""
        return (self.te or te_here()) if self.has_te() else None

    def te_is_here(self) -> bool:
        """Whether the job's Transformer Engine is the one that is installed here, so that its modules can be built."""
        return self.has_te() and self.te in ("", te_here())

    def capability(self) -> tuple[int, int]:
        """Of the GPU."""
        return GPUS[self.gpu].capability

    def surroundings(
        self, world_size: int, per_node: int, env: Mapping[str, str], on_cpu: bool
    ) -> Surroundings:
        """What the checks of arguments are given."""
        lacks = self.te_lacks() if self.has_te() else frozenset()
        return Surroundings(
            world_size=world_size,
            ranks_per_node=per_node,
            on_cpu=on_cpu,
            has_te=self.has_te() and not on_cpu,
            te_lacks=self._dsv3_lacks(lacks) if self.has_te() and not on_cpu else "",
            te_fp32_scales=has_fp32_scales(env),
            has_deepep=_present(self.deepep, "deep_ep"),
            megatron_version=importlib.metadata.version("megatron-core"),
            lacks=lacks,
            has_apex=_present(self.apex, "fused_weight_gradient_mlp_cuda"),
            torch=self.torch or requirements.installed_version(TORCH) or "",
            cuda=self.cuda or requirements.installed_version(CUDA) or "13.0",
            cudnn=self.cudnn or requirements.installed_version(CUDNN) or "",
            capability=self.capability(),
            max_connections=max_connections(env),
            files_here=False,  # they are on the cluster; what is not seen from here is a warning
        )

    def te_lacks(self) -> frozenset[str]:
        """Keys of what the job's Transformer Engine does not have."""
        return lacking(TE) if self.te_is_here() else lacking(TE, self.te)

    def _dsv3_lacks(self, lacks: frozenset[str]) -> str:
        if self.te_is_here():
            from dsv3_megatron.fp8 import te_recipe

            return te_recipe.lacking()
        needed = [
            use for use in requirements.USES if use.key in requirements.DSV3_RECIPE and use.key in lacks
        ]
        return needed[0].what if needed else ""


def te_here() -> str | None:
    """Version of the Transformer Engine that is installed here."""
    return requirements.installed_version("transformer-engine-torch") and requirements.installed_version(TE)


def _present(said: str, module: str) -> bool:
    from dsv3_megatron.arguments.surroundings import has_fused_wgrad, is_installed

    if said:
        return said == "present"
    return has_fused_wgrad() if module == "fused_weight_gradient_mlp_cuda" else is_installed(module)
