"""What the study of the moments makes of two loss curves."""

import pytest

from dsv3_megatron.optimizer.study import compare, differences, draw


def curves(factor: float, steps: int = 100) -> dict:
    fp32 = {step: 5.0 - 0.01 * step for step in range(1, steps + 1)}
    return {"bf16_moments": {s: v * factor for s, v in fp32.items()}, "fp32_moments": fp32}


def test_a_constant_factor_is_the_difference(tmp_path) -> None:
    result = compare(curves(1.004), warmup=10)
    assert result["max_difference"] == pytest.approx(0.004) and result["within_target"]
    assert result["last_difference"] == pytest.approx(0.004) and result["steps"] == 100
    assert not compare(curves(0.994), warmup=10)["within_target"]
    draw(curves(1.004), result, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_only_steps_after_the_warmup_count() -> None:
    data = curves(1.0)
    data["bf16_moments"][1] = 50.0
    assert not compare(data, warmup=5)["within_target"] and compare(data, warmup=95)["within_target"]
    del data["bf16_moments"][7]
    with pytest.raises(LookupError, match="different steps"):
        differences(data)
