"""Generation with a model of `--spec dsv3` in Megatron's dynamic engine, over a paged cache of MLA's latents.

`Engine` is what other code uses: `generate(prompts, sampling)`, `log_probs(tokens)`, `close()`. Megatron schedules,
batches, pages, samples and verifies; what is ours is the cache of latents (`context`), the MTP layer's draft over the
whole context (`controller`), random numbers by request (`sampling`) and stop strings (`scheduler`). Nothing is
imported before it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_megatron.inference.engine import Engine, EngineSettings, Generation, Sampling

__all__ = ["Engine", "EngineSettings", "Generation", "Sampling"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsv3_megatron.inference import engine

    return getattr(engine, name)
