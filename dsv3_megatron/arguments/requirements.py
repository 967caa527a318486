"""What is used of each package beneath us, and since when it is there: the versions that are supported follow from it.

Installed packages are asked for the symbol itself, so a build between two versions is judged by what it has. A package
that is only imagined (`dsv3 preflight te=2.8`) is judged by `since`. Read by the doctor, by `Surroundings` and so by
the refusal table, and by docs/support.md.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TE, TORCH, TRITON, CUDA, CUDNN, NCCL = "transformer-engine", "torch", "triton", "CUDA", "cuDNN", "NCCL"


@dataclass(frozen=True)
class Use:
    """One thing that is used.

    Attributes:
        key: short and unique; what `Surroundings.lacks` holds.
        package: distribution on PyPI, or the name of a library that has none.
        since: first version that has it, read in the package's source.
        what: the thing, in the package's words.
        by: which of our features uses it; "" for every run.
        symbol: how an installed package is asked: `module:Name`, `module:Name(parameter)` or `module:Name.method~word`
            (the method's source names the word). "" where there is nothing to ask but the version.
        required: nothing that uses the package runs without it, so `since` bounds the supported versions.
    """

    key: str
    package: str
    since: str
    what: str
    by: str = ""
    symbol: str = ""
    required: bool = False


_ADAM = "transformer_engine.pytorch.optimizers:FusedAdam"

USES: tuple[Use, ...] = (
    # torch
    Use(
        "torch_cuda_13",
        TORCH,
        "2.11",
        "wheel with CUDA 13 (block-scaled FP8 needs 12.9); the oldest that is tested",
        required=True,
    ),
    Use(
        "mm_out_dtype",
        TORCH,
        "2.8",
        "torch.addmm(…, out_dtype=)",
        "weight gradients of Megatron's own Linears in fp32",
    ),
    # Triton
    Use("triton_knobs", TRITON, "3.4", "triton.knobs", "the FP8 kernels", "triton:knobs", required=True),
    # CUDA, cuDNN, NCCL
    Use(
        "block_gemm",
        CUDA,
        "12.9",
        "cuBLASLt products with block scales",
        "--fp8-recipe dsv3, blockwise",
        required=True,
    ),
    Use(
        "mla_attention",
        CUDNN,
        "9.5",
        "fused attention with head sizes 192 and 128, backward, on Hopper",
        "MLA under TE",
        required=True,
    ),
    Use("mla_attention_blackwell", CUDNN, "9.11", "the same on Blackwell", "MLA under TE"),
    Use(
        "max_ctas",
        NCCL,
        "2.17",
        "ncclConfig_t.maxCTAs",
        "--pipeline-schedule: messages that take one or two SMs",
        required=True,
    ),
    Use("ranks_share_gpu", NCCL, "2.30", "NCCL_MULTI_RANK_GPU_ENABLE", "tests with several ranks on one GPU"),
    # Transformer Engine
    Use(
        "delayed_wgrad",
        TE,
        "2.8",
        "backward_dw() with hooks for gradient reduction",
        "--transformer-impl transformer_engine",
        "transformer_engine.pytorch.module.base:TransformerEngineBaseModule.register_wgrad_accumulation_and_reduce_hooks",
        required=True,
    ),
    Use(
        "save_original_input",
        TE,
        "2.8",
        "Linear(save_original_input=)",
        "the Linear after attention, and the one after SwiGLU, keep their input",
        "transformer_engine.pytorch:Linear(save_original_input)",
    ),
    Use(
        "grouped_save_original_input",
        TE,
        "2.8",
        "GroupedLinear(save_original_input=)",
        "--fp8-recipe dsv3: the routed experts' Linear after SwiGLU keeps its input",
        "transformer_engine.pytorch:GroupedLinear(save_original_input)",
    ),
    Use(
        "block_scaling",
        TE,
        "2.8",
        "Float8BlockScaling with QParams",
        "--fp8-recipe blockwise, dsv3",
        "transformer_engine.common.recipe:Float8BlockScaling",
    ),
    Use(
        "bf16_moments_in_place",
        TE,
        "2.13",
        "FusedAdam that reads bf16 moments as they are stored",
        "bf16 moments that save memory at the step's peak too",
        _ADAM + ".__init__~fuse_unscale",
    ),
    Use(
        "moment_dtypes",
        TE,
        "2.8",
        "FusedAdam(exp_avg_dtype=)",
        "--use-precision-aware-optimizer",
        _ADAM + "(exp_avg_dtype)",
    ),
    Use(
        "permute_fusion",
        TE,
        "2.8",
        "moe_permute_with_probs",
        "--moe-permute-fusion",
        "transformer_engine.pytorch.permutation:moe_permute_with_probs",
    ),
)

# What `--fp8-recipe dsv3` takes of Transformer Engine.
DSV3_RECIPE = ("block_scaling", "save_original_input", "grouped_save_original_input")


def oldest(package: str) -> str:
    """The oldest supported version of a package."""
    return max((use.since for use in USES if use.package == package and use.required), key=version_key)


def lacking(package: str, version: str | None = None) -> frozenset[str]:
    """Keys of what the package lacks: the installed one by its symbols, an imagined one by its version.

    Args:
        version: of an imagined package; None asks the installed one. What has no symbol is judged by the version then
            too, and nothing is said of a library whose version is unknown.
    """
    mine = [use for use in USES if use.package == package]
    if version is not None:
        return frozenset(use.key for use in mine if version_key(version) < version_key(use.since))
    found = installed_version(package)
    return frozenset(use.key for use in mine if not _has(use, found))


def _has(use: Use, version: str | None) -> bool:
    if use.symbol:
        return has_symbol(use.symbol)
    return version is None or version_key(version) >= version_key(use.since)


def has_symbol(symbol: str) -> bool:
    """Whether the installed package has it; see `Use.symbol`."""
    match = re.fullmatch(r"([\w.]+):([\w.]+)(?:\((\w+)\)|~(\w+))?", symbol)
    if match is None:
        raise ValueError(
            f"{symbol!r}: not of the form module:Name, module:Name(parameter) or module:Name.method~word"
        )
    module, path, parameter, word = match.groups()
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, OSError):
        return False
    if parameter:
        return parameter in inspect.signature(found).parameters
    return word is None or word in inspect.getsource(found)


def installed_version(package: str) -> str | None:
    """Version of a package or library here, None where it is unknown or absent."""
    if package in (CUDA, CUDNN, NCCL):
        return _library_version(package)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library_version(name: str) -> str | None:
    """What torch was built with: the same wheels hold the libraries."""
    import torch

    if name == CUDA:
        return torch.version.cuda
    module = {CUDNN: "nvidia-cudnn-cu", NCCL: "nvidia-nccl-cu"}[name]
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        return importlib.metadata.version(module + major)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_key(version: str) -> tuple[int, ...]:
    """Numbers of a version for comparing, without suffixes such as rc1 or +cu130."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        leading = re.match(r"\d+", part)
        if leading is None:
            break
        numbers.append(int(leading.group()))
    return tuple(numbers)


def packages() -> Iterable[str]:
    """In the table's order, each once."""
    return dict.fromkeys(use.package for use in USES)
