"""Forwarding addresses: modules that scripts know under an earlier name, `python -m` and import alike.

An old name is the module of the new one, not a copy of it.
"""

import importlib
import importlib.util
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# Old name to new one, without the package's own; what lies below an old name is found below the new one.
ADDRESSES = {
    # studies, benchmarks and demonstrations have a wing of their own
    "convert.bench": "studies.convert_speed",
    "demo.throughput": "studies.throughput",
    "ema.bench": "studies.ema_cost",
    "fp8.accumulation": "studies.accumulation",
    "fp8.bench": "studies.fp8_speed",
    "fp8.study": "studies.fp8",
    "longctx": "studies.longctx",
    "optimizer.study": "studies.moments",
    "pipeline.bench": "studies.pipeline_speed",
    "pipeline.sleeping": "studies.sleeping",
    "plan.bench": "studies.planner_error",
    "recipe.memory": "studies.recompute_memory",
    "sft.demo": "studies.sft",
    # what works on a recipe is a tool
    "recipe.ranks": "plan.recipe.ranks",
    "recipe.show": "plan.recipe.show",
    # below the specs
    "specs.attention": "backends.attention",
    "specs.backend": "backends.backend",
    "specs.linear": "backends.linear",
    "specs.mla": "backends.mla",
    "specs.norm": "backends.norm",
    "specs.reference": "backends.reference",
    "specs.te": "backends.te",
    # where Megatron and torch.distributed are
    "pipeline.p2p": "dualpipe.p2p",
    "conf.placement": "pipeline.placement",
    "preflight.host_memory": "checkpoint.host_memory",
    "fp8.recipe": "fp8.precision",
}
_PACKAGE = __name__.partition(".")[0]


def new_name(name: str) -> str | None:
    """The full name that a full old name stands for today, None for a name that is no old one."""
    if not name.startswith(f"{_PACKAGE}."):
        return None
    for old, new in ADDRESSES.items():
        head, tail = f"{_PACKAGE}.{old}", name.removeprefix(f"{_PACKAGE}.{old}")
        if name == head or (name.startswith(head) and tail.startswith(".")):
            return f"{_PACKAGE}.{new}{tail}"
    return None


class Forwarding(MetaPathFinder):
    """Finds old names."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        new = new_name(name)
        found = importlib.util.find_spec(new) if new is not None else None
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return ModuleSpec(name, _Forwarded(found), origin=found.origin, is_package=is_package)


class _Forwarded(InspectLoader):
    """Loads an old name: the module of the new one when imported, its code when run."""

    def __init__(self, found: ModuleSpec) -> None:
        self._found = found

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(self._found.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._found  # importlib has put the old name's in its place

    def get_code(self, fullname: str) -> CodeType | None:
        loader = self._found.loader
        assert isinstance(loader, InspectLoader)
        return loader.get_code(self._found.name)

    def get_source(self, fullname: str) -> str | None:
        loader = self._found.loader
        assert isinstance(loader, InspectLoader)
        return loader.get_source(self._found.name)

    def is_package(self, fullname: str) -> bool:
        return self._found.submodule_search_locations is not None


def install() -> None:
    """Let this process find old names; idempotent."""
    if not any(isinstance(finder, Forwarding) for finder in sys.meta_path):
        # First: a package that moved still has its folder, in which others would find a second copy of its modules.
        sys.meta_path.insert(0, Forwarding())
