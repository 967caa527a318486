"""Which layers each pipeline stage holds, in Megatron's layer-layout notation."""

from dsv3_megatron.errors import ConfigError


def layers_per_stage(num_layers: int, num_stages: int, last_stage_extra: int = 0) -> list[int]:
    """Decoder layers of each stage, as even as whole layers allow.

    The last stage is counted as if it held `last_stage_extra` layers already (MTP, output head). What does
    not divide goes to the first stages. 61 layers over 16 stages with an extra of 3 are 15 × 4 and 1.

    Errors: ConfigError when a stage other than the last would be empty, or the last one holds nothing.
    """
    if num_layers < num_stages - 1 + (last_stage_extra == 0):
        raise ConfigError(
            f"pipeline_model_parallel_size: {num_stages} stages are too many for num_layers={num_layers}; use"
            " a layout with fewer stages, or a larger model"
        )
    extra = paid_extra(num_layers, num_stages, last_stage_extra)
    quotient, remainder = divmod(num_layers + extra, num_stages)
    counts = [quotient + (stage < remainder) for stage in range(num_stages)]
    counts[-1] -= extra
    return counts


def paid_extra(num_layers: int, num_stages: int, last_stage_extra: int) -> int:
    """What of `last_stage_extra` the layers can pay without taking more from the last stage than it would have."""
    extra = last_stage_extra
    while extra > 0 and (num_layers + extra) // num_stages < extra:
        extra -= 1
    return extra


def layer_layout(counts: list[int], mtp_num_layers: int) -> str:
    """Megatron's notation for `--pipeline-model-parallel-layout`.

    `E` embedding, `t` decoder layer, `m` MTP layer, `L` loss, `|` between stages; equal neighbours are
    folded:
    `[4] * 15 + [1]` with one MTP layer is `Et*4|(t*4|)*14tmL`.
    """

    def stage(count: int) -> str:
        return "t" * count if count < 3 else f"t*{count}"

    tail = "m" * mtp_num_layers + "L"
    if len(counts) == 1:
        return f"E{stage(counts[0])}{tail}"
    text, middle = f"E{stage(counts[0])}|", counts[1:-1]
    while middle:
        run = next((i for i, count in enumerate(middle) if count != middle[0]), len(middle))
        # Megatron unfolds (..)*n before x*n, so the digits inside stay those of the layer.
        text += f"({stage(middle[0])}|)*{run}" if run > 1 else f"{stage(middle[0])}|"
        middle = middle[run:]
    return f"{text}{stage(counts[-1])}{tail}"
