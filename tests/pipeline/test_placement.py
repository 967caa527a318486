"""Layer placement, against Megatron's own reading of the notation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from dsv3_megatron.conf import ConfigError
from dsv3_megatron.pipeline.placement import layer_layout, layers_per_stage


def test_deepseek_v3_over_16_stages() -> None:
    counts = layers_per_stage(61, 16, last_stage_extra=3)
    assert counts == [4] * 15 + [1]
    assert layer_layout(counts, mtp_num_layers=1) == "Et*4|(t*4|)*14tmL"


@given(
    num_stages=st.integers(1, 40), spare=st.integers(0, 100), extra=st.integers(0, 5), mtp=st.integers(0, 2)
)
def test_megatron_reads_back_the_same_placement(num_stages: int, spare: int, extra: int, mtp: int) -> None:
    num_layers = num_stages + spare
    counts = layers_per_stage(num_layers, num_stages, extra)
    assert len(counts) == num_stages and sum(counts) == num_layers and min(counts) >= 0
    # As even as whole layers allow, the last stage standing back by at most the extra.
    assert max(counts) - min(counts[:-1] or counts) <= 1
    assert max(counts) - counts[-1] <= extra + 1

    parsed = PipelineParallelLayerLayout(layer_layout(counts, mtp), num_stages)
    parsed.validate_layer_layout(num_layers, mtp)
    assert [row[0].count(LayerType.decoder) for row in parsed.layout] == counts
    assert parsed.layout[-1][0].count(LayerType.mtp) == mtp


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"16 stages are too many for num_layers=4"):
        layers_per_stage(4, 16)
