"""Rotary positions in config.json: `rope_theta`, `rope_scaling` (as released), `rope_parameters` (transformers 5).

YaRN has two factors here. cos and sin are multiplied by `g(mscale) / g(mscale_all_dim)`, the softmax scale by
`g(mscale_all_dim)²`, with g(m) = 0.1·m·ln(factor) + 1. That is how the released code and Megatron's MLA read the two
numbers; transformers reads some values otherwise, and such a config.json is refused. `attention_factor`, which only
transformers knows, takes the place of the first factor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.convert.errors import ConversionError

__all__ = ["ROPE_KEYS", "Yarn", "rope_from_hf", "rope_to_hf"]

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
_DEFAULT_THETA = 10000  # of the released configuration class and of transformers'
_YARN = ("factor", "original_max_position_embeddings")  # without these readers differ
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}  # the same for every reader
_MSCALES = ("mscale", "mscale_all_dim", "attention_factor")
# Keys of transformers that are another rope when they have another value.
_FIXED = {"truncate": True, "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Yarn:
    """Long-context rope (report §4.3); fields as in config.json, factors as in the module's docstring."""

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


def rope_from_hf(config: Mapping[str, Any]) -> tuple[int, Yarn | None]:
    """Base of the frequencies, and YaRN or None.

    Raises:
        ConversionError: a key is unknown, missing, or read differently by different readers; names it.
    """
    rope = _merged(config)
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    theta = _number("rope_theta", _DEFAULT_THETA if theta is None else theta)
    if theta != int(theta) or theta <= 1:
        raise ConversionError(f"config.json: rope_theta={theta}: Megatron's --rotary-base is a whole number")
    kind = rope.pop("rope_type")
    for key, value in _FIXED.items():
        if rope.pop(key, value) != value:
            raise ConversionError(
                f"config.json: rope: {key} must be {value}: Megatron's MLA knows nothing else"
            )
    if kind not in ("default", "yarn"):
        raise ConversionError(f"config.json: rope type {kind!r} is not DeepSeek-V3's: yarn, or none")
    known = () if kind == "default" else (*_YARN, *_YARN_DEFAULTS, *_MSCALES)
    if unknown := sorted(rope.keys() - set(known)):
        raise ConversionError(f"config.json: rope of type {kind!r} with {unknown}: not known to conversion")
    return int(theta), _yarn(rope) if kind == "yarn" else None


def rope_to_hf(theta: float, yarn: Yarn | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as the release has them."""
    if yarn is None:
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {"type": "yarn", **vars(yarn)}
    if not _agree(yarn):
        scaling["attention_factor"] = _released_factors(yarn)[0]
    return {"rope_theta": theta, "rope_scaling": scaling}


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings as one dict without nulls, with `rope_type`; whatever is said twice must agree."""
    parts = {
        "config.json": {"rope_theta": config.get("rope_theta")},
        **{key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)},
    }
    merged: dict[str, Any] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise ConversionError(f"config.json: {key}={part!r}: an object is needed")
        rope = {name: value for name, value in part.items() if value is not None}
        if "type" in rope:
            if rope.get("rope_type", rope["type"]) != rope["type"]:
                raise ConversionError(f"config.json: {key} has two types")
            rope["rope_type"] = rope.pop("type")
        differ = sorted(name for name in rope.keys() & merged.keys() if rope[name] != merged[name])
        if differ:
            raise ConversionError(
                f"config.json: rope_scaling, rope_parameters and rope_theta disagree on {differ}"
            )
        merged |= rope
    return {"rope_type": "default"} | merged


def _yarn(rope: dict[str, Any]) -> Yarn:
    missing = [name for name in _YARN if name not in rope]
    if missing:
        raise ConversionError(
            f"config.json: yarn without {missing}; what they default to differs between readers"
        )
    values = {name: _number(name, value) for name, value in (_YARN_DEFAULTS | rope).items()}
    attention_factor = values.pop("attention_factor", None)
    length = values["original_max_position_embeddings"]
    if (
        values["factor"] < 1
        or length < 1
        or length != int(length)
        or min(values[b] for b in _YARN_DEFAULTS) <= 0
    ):
        raise ConversionError(
            f"config.json: yarn with factor={values['factor']}, original_max_position_embeddings={length}, "
            f"beta_fast={values['beta_fast']}, beta_slow={values['beta_slow']}: factor is at least 1, the others are "
            "positive, the length is whole"
        )
    yarn = Yarn(
        **(
            {"mscale": 1.0, "mscale_all_dim": 0.0}
            | values
            | {"original_max_position_embeddings": int(length)}
        )
    )
    if attention_factor is None:
        if not _agree(yarn):
            raise ConversionError(
                f"config.json: yarn with mscale={rope.get('mscale')} and mscale_all_dim={rope.get('mscale_all_dim')} "
                f"multiplies cos and sin by {_released_factors(yarn)[0]:.6f} in the released code and by "
                f"{_transformers_factor(yarn):.6f} in transformers: add the one that is meant as attention_factor"
            )
        return yarn
    return _with_attention_factor(yarn, attention_factor)


def _g(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _released_factors(yarn: Yarn) -> tuple[float, float]:
    """What the released code and Megatron multiply cos and sin, and the softmax scale, with."""
    softmax = _g(yarn.factor, yarn.mscale_all_dim)
    return _g(yarn.factor, yarn.mscale) / softmax, softmax**2


def _transformers_factor(yarn: Yarn) -> float:
    """What transformers multiplies cos and sin with (its softmax scale is the released code's)."""
    both = yarn.mscale and yarn.mscale_all_dim
    return _released_factors(yarn)[0] if both else _g(yarn.factor, 1.0)


def _agree(yarn: Yarn) -> bool:
    return math.isclose(_released_factors(yarn)[0], _transformers_factor(yarn), rel_tol=1e-12)


def _with_attention_factor(yarn: Yarn, wanted: float) -> Yarn:
    """The same YaRN with the `mscale` that multiplies cos and sin by `wanted`."""
    softmax = _g(yarn.factor, yarn.mscale_all_dim)
    if math.isclose(wanted, _released_factors(yarn)[0], rel_tol=1e-12):
        return yarn
    if yarn.factor == 1 or wanted <= 0:
        raise ConversionError(
            f"config.json: attention_factor={wanted} with factor={yarn.factor} cannot be said in Megatron's mscale"
        )
    mscale = (wanted * softmax - 1) / (0.1 * math.log(yarn.factor))
    return Yarn(**{**vars(yarn), "mscale": mscale})


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConversionError(f"config.json: {name}={value!r}: a number is needed")
    return value
