"""A `pickle_module` for torch.load that makes no objects but plain ones: to read Megatron's arguments without Megatron.

Namespaces, strings and torch dtypes are what they are; anything else (enums, configurations) becomes an empty
`Unknown`, and no code of the file is run.
"""

import pickle
from typing import Any

__all__ = ["Unknown", "Unpickler", "load"]

_PLAIN = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("builtins", "str"),
    ("__builtin__", "unicode"),
}


class Unknown:
    """Stands for an object of another class."""

    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Unknown":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and _is_dtype(name)
        return super().find_class(module, name) if is_dtype or (module, name) in _PLAIN else Unknown


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


def load(file: Any, **options: Any) -> Any:
    return Unpickler(file, **options).load()
