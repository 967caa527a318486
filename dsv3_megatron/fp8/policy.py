"""What is kept in which format: one table, printed at the start of a run and checked against real modules in tests.

Report §3.3.1: all products of Linears in E4M3; embedding, output head, gating, norms and attention operators in BF16 or
FP32; master weights, weight gradients and accumulated gradients in FP32. §3.3.3: AdamW's moments in BF16.

What is kept for the backward pass differs between the backends where Transformer Engine's modules or Megatron's around
them decide it: `te` says what they really do (`tests/fp8/test_te_modules.py`), not what the report has.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["OPTIMIZER", "POLICY", "Row", "announce", "row_of", "table"]


@dataclass(frozen=True)
class Row:
    """The format of some modules.

    Attributes:
        what: for people.
        modules: regular expression that the end of a module's name matches.
        compute: format of the operands of products ("E4M3"), or what the module computes in.
        reference, te: what is kept for the backward pass on this backend; "" where that is a module's own affair.
    """

    what: str
    modules: str
    compute: str
    reference: str = ""
    te: str = ""

    @property
    def fp8(self) -> bool:
        return self.compute == "E4M3"

    def kept(self, transformer_impl: str) -> str:
        """What is kept under `--transformer-impl`."""
        return self.reference if transformer_impl == "local" else self.te


_E5M6 = "input in E5M6, 12 bits"
_SWIGLU = "SwiGLU's input in E4M3, output computed again"
# The first row that matches counts.
POLICY = (
    Row("embedding", r"word_embeddings", "BF16"),
    Row("output head", r"output_layer", "BF16"),
    Row("gating", r"router", "FP32"),
    Row("norms", r"\w*norm", "FP32", te="input in BF16"),
    Row(
        "attention operators",
        r"core_attention(\..*)?",
        "BF16",
        reference="queries, keys, values, probabilities in FP32",
        te="queries, keys, values in BF16",
    ),
    Row("Linear after attention", r"linear_proj", "E4M3", _E5M6, _E5M6),
    Row("second Linear of an MLP", r"linear_fc2", "E4M3", _SWIGLU, _SWIGLU),
    Row(
        "shared expert's first Linear",
        r"shared_experts\.linear_fc1",
        "E4M3",
        reference="input in E4M3, 1×128",
        te="input in BF16, the router's",
    ),
    Row("other Linears", r"linear_\w+|eh_proj", "E4M3", "input in E4M3, 1×128", "input in E4M3, 128×1"),
)

# Name in Megatron's arguments to format.
OPTIMIZER = {
    "main_params_dtype": "fp32",
    "main_grads_dtype": "fp32",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}


def row_of(name: str) -> Row | None:
    """The row of the module with this name; None for modules that only hold others."""
    return next((row for row in POLICY if re.search(rf"(^|[._])({row.modules})$", name)), None)


def table(recipe: Any, transformer_impl: str) -> str:
    """The policy of a `precision.Recipe` on a backend, for people."""
    lines = [f"> --fp8-recipe {recipe.name}: module, products, kept for backward"]
    for row in POLICY:
        lines.append(f">   {row.what:<28} {row.compute:<5} {row.kept(transformer_impl)}".rstrip())
    sent = "E4M3  scales 2^n; combine BF16" if recipe.dispatch == "e4m3" else "BF16"
    formats = ", ".join(f"{name} {value}" for name, value in OPTIMIZER.items())
    return "\n".join([*lines, f">   {'dispatch':<28} {sent}", f">   optimizer: {formats}"])


def announce(config: Any) -> None:
    """Print the policy once per process, on rank 0, if the configuration names a recipe of ours."""
    from dsv3_megatron.fp8.precision import recipe_of

    recipe = recipe_of(config)
    if recipe is not None:
        _print_once(recipe, config.transformer_impl)


@functools.cache
def _print_once(recipe: Any, transformer_impl: str) -> None:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        print(table(recipe, transformer_impl), flush=True)
