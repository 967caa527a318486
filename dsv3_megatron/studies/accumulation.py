"""The error of sums in the H800's tensor cores, with and without promotion to fp32 (report §3.3.2), measured and drawn.

    python -m dsv3_megatron.studies.accumulation [--picture FILE]

The last line on stdout is one JSON object.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dsv3_megatron.fp8.gemm import gemm_nt
from dsv3_megatron.fp8.tiles import dequantize, quantize_block, quantize_tile

INNER_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)


def largest_error(k: int, promote_every: int | None, size: int = 256, seed: int = 0) -> float:
    """Largest error of an element of a [size, k] · [size, k]ᵀ product of standard normal matrices in E4M3.

    Relative to the root mean square of the exact product of the same quantised matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    a = quantize_tile(torch.randn(size, k, generator=generator))
    b = quantize_block(torch.randn(size, k, generator=generator))
    exact = dequantize(*a).double() @ dequantize(*b).double().t()
    error = gemm_nt(a, b, "h800", promote_every) - exact
    return (error.abs().max() / exact.square().mean().sqrt()).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.accumulation", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--picture", type=Path, default=Path("docs/fp8_accumulation.png"))
    options = parser.parse_args(argv)
    errors = {
        "never promoted": [largest_error(k, None) for k in INNER_SIZES],
        "promoted every 512": [largest_error(k, 512) for k in INNER_SIZES],
        "promoted every 128": [largest_error(k, 128) for k in INNER_SIZES],
    }
    _draw(errors, options.picture)
    print(f"picture: {options.picture}")
    print(json.dumps({"inner_sizes": INNER_SIZES, "largest_error": errors}))


def _draw(errors: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, values in errors.items():
        axes.plot(INNER_SIZES, [100 * value for value in values], marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="K",
        ylabel="largest error, % of the result's rms",
        xticks=INNER_SIZES,
    )
    axes.set_xticklabels([str(k) for k in INNER_SIZES])
    axes.minorticks_off()
    axes.set_title("E4M3 products summed in 14 bits")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
