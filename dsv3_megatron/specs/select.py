"""Which of the four backends a configuration names; the only module that knows them all."""

from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.backends.backend import Backend
from dsv3_megatron.fp8.precision import recipe_of

__all__ = ["select_backend"]


def select_backend(config: TransformerConfig) -> Backend:
    """The backend for `--transformer-impl` ("local" is plain PyTorch, "transformer_engine" is TE) and `--fp8-recipe`.

    Raises:
        ValueError: any other name.
        ModuleNotFoundError: Transformer Engine is asked for and not installed.
    """
    if config.transformer_impl == "local":
        from dsv3_megatron.backends import reference

        if recipe_of(config) is None:
            return reference.BACKEND
        from dsv3_megatron.fp8 import backend

        return backend.BACKEND
    if config.transformer_impl == "transformer_engine":
        from dsv3_megatron.backends import te

        if recipe_of(config) is None:
            return te.BACKEND
        from dsv3_megatron.fp8 import te_backend

        return te_backend.BACKEND
    raise ValueError(
        f"--transformer-impl {config.transformer_impl}: --spec dsv3 has local (plain PyTorch) and transformer_engine"
    )
