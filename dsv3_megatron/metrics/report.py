"""One logged step: figures from the collected numbers, and their three outputs."""

import json
import math
from pathlib import Path
from typing import Any

from dsv3_megatron.metrics.experts import LayerExperts

__all__ = ["append_json", "console", "expert_figures", "to_tensorboard"]


def expert_figures(layers: dict[int, LayerExperts]) -> dict[str, Any]:
    """The worst layer's load, sums over layers, and the figures of each layer; empty without MoE layers."""
    if not layers:
        return {}
    dropped = [layer.dropped for layer in layers.values() if layer.dropped is not None]
    return {
        "max_over_mean_expert_load": max(layer.max_over_mean for layer in layers.values()),
        "dead_experts": sum(layer.dead for layer in layers.values()),
        "bias_min": min(layer.bias_min for layer in layers.values()),
        "bias_max": max(layer.bias_max for layer in layers.values()),
        "dropped_tokens": sum(dropped) if len(dropped) == len(layers) else None,
        "layers": {str(number): layer.summary() for number, layer in layers.items()},
    }


def console(record: dict[str, Any], num_layers: int) -> str:
    """A line of totals and, with MoE layers, a table with a column per layer."""
    text = " | ".join(
        [
            f" dsv3 iteration {record['iteration']}",
            f"tokens/s {record['tokens_per_s']:.1f}",
            f"model FLOPs per token (forward and backward, no recomputation): "
            f"{_si(record['model_flops_per_token_causal'])} causal, "
            f"{_si(record['model_flops_per_token_non_causal'])} non-causal",
            f"per GPU: {_si(record['model_flops_per_s_per_gpu_causal'])}/s causal, "
            f"{_si(record['model_flops_per_s_per_gpu_non_causal'])}/s non-causal",
            *([f"MTP loss {record['mtp_loss']:.4f}"] if record["mtp_loss"] is not None else []),
            *([f"dropped tokens {_or_dash(record['dropped_tokens'])}"] if "layers" in record else []),
            *(
                f"{name.replace('_', ' ').removesuffix(' bytes')} {value / 1e6:.1f} MB per step"
                for name, value in record.items()
                if name.endswith("_bytes")
            ),
        ]
    )
    if "layers" not in record:
        return text
    layers = record["layers"]
    names = [f"mtp{int(n) - num_layers}" if int(n) >= num_layers else n for n in layers]
    rows = [("layer", names)]
    rows += [("load max/mean", [f"{layer['max_over_mean']:.2f}" for layer in layers.values()])]
    rows += [("dead experts", [str(layer["dead"]) for layer in layers.values()])]
    rows += [
        (f"bias {end}", [f"{layer[f'bias_{end}']:+.3f}" for layer in layers.values()])
        for end in ("min", "max")
    ]
    return "\n".join(
        [text, *(f"   {name:<14}" + "".join(f"{cell:>8}" for cell in cells) for name, cells in rows)]
    )


def to_tensorboard(writer: Any, record: dict[str, Any]) -> None:
    """Scalars by iteration; a layer's have its number (MTP follows the decoder) at the end of their name."""
    iteration = record["iteration"]
    for name, value in record.items():
        if isinstance(value, int | float) and name != "iteration":
            writer.add_scalar(f"dsv3/{name}", value, iteration)
    for number, layer in record.get("layers", {}).items():
        for name, value in layer.items():
            if isinstance(value, int | float):
                writer.add_scalar(f"experts-{name}/layer_{int(number):02d}", value, iteration)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append the record as one line; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(_finite(record), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _si(flops: float) -> str:
    """`2.504e11` → `250.4 GFLOP`."""
    units = ["", "K", "M", "G", "T", "P"]
    while flops >= 1000 and len(units) > 1:
        flops /= 1000
        units.pop(0)
    return f"{flops:.4g} {units[0]}FLOP"
