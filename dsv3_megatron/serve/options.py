"""Options that the commands share, and the engine that they ask for."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_megatron.arguments.surroundings import is_installed
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.serve.load import (
    DTYPES,
    Layout,
    default_cache_bytes,
    free_bytes,
    loaded_model,
    page_bytes,
    use_device,
)
from dsv3_megatron.serve.source import Source, open_source
from dsv3_megatron.specs.deployment import Deployment

if TYPE_CHECKING:
    from dsv3_megatron.inference import Engine, EngineSettings, Sampling

__all__ = [
    "add_engine_options",
    "add_model_options",
    "add_sampling_options",
    "engine_settings",
    "is_first_rank",
    "layout_of",
    "open_model",
    "opened_engine",
    "sampling_of",
]


def new_parser(
    prog: str, description: str | None, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Of a command of this folder, whose description is its module's text as it stands."""
    return kind(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where the model is, and how it is laid out."""
    model = parser.add_argument_group("model")
    model.add_argument("--load", type=Path, metavar="DIR", help="Megatron checkpoint, of any training layout")
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory")
    model.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer.json, if not beside the model"
    )
    model.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    model.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on the CPU")
    model.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="default: transformer_engine on a GPU, local (plain PyTorch) on the CPU",
    )
    for name in ("tensor", "pipeline", "expert"):
        model.add_argument(
            f"--{name}-model-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help="under torchrun; default 1",
        )

    for option, help_text in (
        ("--redundant-experts", "experts on the ranks beyond the model's routed ones: copies of the busiest"),
        (
            "--rebalance-interval",
            "steps of the engine after which copies follow the measured load (0: never)",
        ),
    ):
        model.add_argument(option, type=int, default=0, metavar="N", help=f"{help_text}; default 0")
    model.add_argument(
        "--shared-expert-as-routed",
        action="store_true",
        help="the shared expert is one more routed one, with copies among the redundant experts",
    )
    model.add_argument(
        "--mlp-tensor-parallel-size",
        type=int,
        choices=(1,),
        help="1: dense MLPs and shared experts whole on every tensor-parallel rank (default: as attention)",
    )
    model.add_argument(
        "--microbatches",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: halves of a pass, one's messages beside the other's products (default: %(default)s)",
    )


def add_engine_options(parser: argparse.ArgumentParser, max_batch: int) -> None:
    """Sizes of the engine."""
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-batch", type=int, default=max_batch, help="requests at the same time (default: %(default)s)"
    )
    engine.add_argument("--max-length", type=int, help="tokens of prompt and answer (default: the model's)")
    engine.add_argument(
        "--max-step-tokens", type=int, default=2048, help="of a forward pass (default: %(default)s)"
    )
    engine.add_argument(
        "--cache-gb", type=float, help="of a rank (default: what the batch can fill, if there is room)"
    )
    engine.add_argument(
        "--speculative",
        choices=("mtp",),
        help="draft a token ahead with the MTP layer; answers stay the same",
    )


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float, max_new_tokens: int) -> None:
    """How tokens are chosen."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="default: %(default)s")
    sampling.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)"
    )
    sampling.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s, no limit")
    sampling.add_argument("--top-k", type=int, default=0, help="default: %(default)s, no limit")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    sampling.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def layout_of(options: argparse.Namespace) -> Layout:
    """The parallel sizes."""
    return Layout(
        options.tensor_model_parallel_size,
        options.pipeline_model_parallel_size,
        options.expert_model_parallel_size,
        Deployment(
            options.redundant_experts,
            options.shared_expert_as_routed,
            options.mlp_tensor_parallel_size == 1,
            options.microbatches,
        ),
    )


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def open_model(options: argparse.Namespace) -> Source:
    """The model that the options name, with everything checked that needs no weights; fills in defaults."""
    use_device(options.device)
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.transformer_impl = options.transformer_impl or ("transformer_engine" if on_gpu else "local")
    if options.transformer_impl == "transformer_engine" and not is_installed("transformer_engine"):
        raise RefusedArgument(
            "--transformer-impl transformer_engine: is not there (nor ever on the CPU); use --transformer-impl local"
        )
    source = open_source(options.load, options.hf, options.tokenizer)
    arch = source.architecture
    layout_of(options).check(arch, int(os.environ.get("WORLD_SIZE", "1")))
    longest = arch.max_position_embeddings
    if options.max_length is None:
        options.max_length = longest
    if not 2 <= options.max_length <= longest:
        raise RefusedArgument(
            f"--max-length {options.max_length}: from 2 to the model's context of {longest} tokens"
        )
    for name in ("max_batch", "max_step_tokens"):
        if getattr(options, name) < 1:
            raise RefusedArgument(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    if options.cache_gb is not None and not 0 < options.cache_gb < float("inf"):
        raise RefusedArgument(f"--cache-gb {options.cache_gb}: must be a number above 0")
    if options.rebalance_interval < 0 or (options.rebalance_interval and not options.redundant_experts):
        raise RefusedArgument(
            f"--rebalance-interval {options.rebalance_interval}: 0 or more, and with --redundant-experts only"
        )
    if options.speculative and not arch.mtp_num_layers:
        raise RefusedArgument(
            f"--speculative {options.speculative}: {source.folder} has no MTP layer; leave it out"
        )
    return source


def sampling_of(options: argparse.Namespace, source: Source) -> "Sampling":
    """The sampling that the options ask for, checked."""
    from dsv3_megatron.inference import Sampling

    if options.stop:
        source.need_tokenizer("--stop")
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=tuple(options.stop),
        ignore_ends=options.ignore_eos,
        seed=options.seed,
    )
    sampling.check()
    return sampling


def engine_settings(options: argparse.Namespace, source: Source, **more: Any) -> "EngineSettings":
    """Sizes of the engine on this rank."""
    from dsv3_megatron.inference import EngineSettings

    layout = layout_of(options)
    page = page_bytes(source.architecture, layout, options.dtype, bool(options.speculative))
    if options.cache_gb is None:
        cache_bytes = default_cache_bytes(page, options.max_batch, options.max_length)
    else:
        cache_bytes = int(options.cache_gb * 2**30)
        if cache_bytes > (free := free_bytes()):
            raise RefusedArgument(
                f"--cache-gb {options.cache_gb:g}: {free / 2**30:.2f} GiB are free; use a smaller one"
            )
    # More requests than pages are never under way, and Megatron lays out its tables for as many as it is told.
    max_batch = min(options.max_batch, max(1, cache_bytes // page))
    max_batch = -(-max_batch // layout.tensor) * layout.tensor
    return EngineSettings(
        max_length=options.max_length,
        max_batch=max_batch,
        max_step_tokens=min(options.max_step_tokens, max_batch * options.max_length),
        cache_bytes=cache_bytes,
        speculative=bool(options.speculative),
        rebalance_interval=options.rebalance_interval,
        **more,
    )


@contextmanager
def opened_engine(
    options: argparse.Namespace, source: Source, prefix_caching: bool = False, **more: Any
) -> Iterator["Engine"]:
    """The engine over the loaded model, on this rank.

    Args:
        more: further arguments of `Engine`.
    """
    from dsv3_megatron.inference import Engine

    with loaded_model(source, layout_of(options), options.dtype, options.transformer_impl) as model:
        settings = engine_settings(options, source, prefix_caching=prefix_caching)
        engine = Engine(model, settings, source.ends, source.decode, **more)
        try:
            yield engine
        finally:
            engine.close()
