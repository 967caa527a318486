"""How the few Megatron symbols that must be replaced are: checked by signature, listed, installed by name.

A patch is a module in the `patches` package of the feature that needs it (`dsv3_megatron/dualpipe/patches/…`); the
module's name is the patch's, unique among all, and it holds one `PATCH`. The feature installs it,
`install(["mtp_block_spec"])`; `python -m dsv3_megatron.doctor` lists all of them. A Megatron version whose symbol
looks different is an error (`PatchMismatch`), never a warning.
"""

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Patch",
    "PatchMismatch",
    "PatchStatus",
    "available",
    "install",
    "install_patch",
    "load",
    "signature_of",
    "status",
]

_MARK = "__dsv3_patch__"
_ORIGINAL = "__dsv3_original__"


class PatchMismatch(RuntimeError):
    """A symbol to be replaced is missing or has another signature than the patch was written for."""


@dataclass(frozen=True)
class Patch:
    """One replaced symbol.

    Attributes:
        name: name of the patch and of its module.
        target: `"package.module:attribute"` or `"package.module:Class.method"`.
        signature: what `signature_of(target)` must return, e.g. `"(config, spec, vp_stage=None)"`.
        why: one line, shown by the doctor.
        install: called with the original object (for a method, what the class dict holds), returns its
            replacement.
        also: further `"module:attribute"` places that imported the same object by name; replaced with it.
    """

    name: str
    target: str
    signature: str
    why: str
    install: Callable[[Any], Any]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class PatchStatus:
    """A patch as the doctor shows it; `state` is "installed", "available" or "mismatch"; `feature` is its folder."""

    name: str
    target: str
    why: str
    state: str
    expected: str
    found: str
    feature: str = ""


def megatron_version() -> str:
    """Version of the installed megatron-core distribution, or "not installed"."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def signature_of(obj: Any) -> str:
    """Parameters of a callable with names, kinds and defaults, without annotations.

    Annotations are left out because their text changes with imports, not with meaning; addresses in the
    repr of a default are cut for the same reason.
    """
    signature = inspect.signature(obj)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _locate(target: str) -> tuple[Any, str]:
    """The object that holds the target attribute, and the attribute's name."""
    module_name, _, path = target.partition(":")
    *holders, attribute = path.split(".")
    holder = importlib.import_module(module_name)
    for name in holders:
        holder = getattr(holder, name)
    return holder, attribute


def _mismatch(patch: Patch, found: str) -> PatchMismatch:
    return PatchMismatch(
        f"patch {patch.name!r}: {patch.target} is not what the patch was written for in megatron-core "
        f"{megatron_version()}.\n  expected {patch.signature}\n  found    {found}\n"
        f"Install a supported Megatron version (docs/support.md), or adapt {_where(patch)} to this one."
    )


def _find(patch: Patch) -> tuple[Any, str, Any, str]:
    """Holder, attribute, current object and signature (or the error's text, with the object None)."""
    try:
        holder, attribute = _locate(patch.target)
        current = inspect.getattr_static(holder, attribute)
        return holder, attribute, current, signature_of(getattr(holder, attribute))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return None, "", None, f"nothing usable ({type(error).__name__}: {error})"


def install_patch(patch: Patch) -> None:
    """Replace the patch's target after checking its signature; does nothing when it is replaced already.

    Raises:
        PatchMismatch: the target is missing, its signature differs, or a place in `also` holds another
            object.
    """
    holder, attribute, current, found = _find(patch)
    if getattr(current, _MARK, None) == patch.name:
        return
    if found != patch.signature:
        raise _mismatch(patch, found)
    others = []
    for place in patch.also:
        try:
            other, name = _locate(place)
            same = inspect.getattr_static(other, name) is current
        except (ImportError, AttributeError) as error:
            raise _mismatch(patch, f"{place}: {error}") from error
        if not same:
            raise _mismatch(patch, f"{place} holds another object than {patch.target}")
        others.append((other, name))
    replacement = patch.install(current)
    setattr(replacement, _MARK, patch.name)
    setattr(replacement, _ORIGINAL, current)
    for where, name in [(holder, attribute), *others]:
        setattr(where, name, replacement)


@functools.cache
def modules() -> dict[str, str]:
    """Name of every patch to its module: what lies in the `patches` packages of the features."""
    package = importlib.import_module(__name__.partition(".")[0])
    found = (
        module.name
        for folder in package.__path__
        for patches in sorted(Path(folder).glob("*/patches"))
        for module in pkgutil.iter_modules(
            [str(patches)], f"{package.__name__}.{patches.parent.name}.patches."
        )
    )
    return {module.rpartition(".")[2]: module for module in found}


def available() -> list[Patch]:
    """All patches, by name."""
    return [load(name) for name in sorted(modules())]


def load(name: str) -> Patch:
    """The patch of that name.

    Raises:
        ValueError: there is none.
    """
    known = modules()
    if name not in known:
        raise ValueError(f"no patch named {name!r}; there are: {', '.join(sorted(known))}")
    return importlib.import_module(known[name]).PATCH


def _where(patch: Patch) -> str:
    module = modules().get(patch.name, "the patch")
    return module.replace(".", "/") + ".py" if "." in module else module


def install(names: Iterable[str]) -> None:
    """Install patches by name; see `install_patch` for the errors."""
    for name in names:
        install_patch(load(name))


def status() -> list[PatchStatus]:
    """State of every patch in this process, without installing any."""
    rows, places = [], modules()
    for patch in available():
        _, _, current, found = _find(patch)
        if getattr(current, _MARK, None) == patch.name:
            state = "installed"
        else:
            state = "available" if found == patch.signature else "mismatch"
        feature = places[patch.name].split(".")[1]
        rows.append(PatchStatus(patch.name, patch.target, patch.why, state, patch.signature, found, feature))
    return rows


def unpatched(function: Any) -> Any:
    """What a patched function was before; others as they are."""
    while hasattr(function, _ORIGINAL):
        function = getattr(function, _ORIGINAL)
    return function


def unload(name: str) -> None:
    """Put the original back (for tests that need unpatched Megatron in a long-lived process)."""
    patch = load(name)
    for place in (patch.target, *patch.also):
        if place.partition(":")[0] in sys.modules:
            holder, attribute = _locate(place)
            current = inspect.getattr_static(holder, attribute)
            if getattr(current, _MARK, None) == patch.name:
                setattr(holder, attribute, getattr(current, _ORIGINAL))
