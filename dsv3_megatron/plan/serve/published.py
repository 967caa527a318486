"""What others measured of serving DeepSeek-V3 and R1, as jobs.

One row is the fitted half: `time.GAP` of decoding is what makes its error none. The others are judges.

DeepSeek's overview (open-infra-index, day 6, 2025) gives averages of a day of production, idle moments included, so the
planner, which knows no queue, should be above them. Its input tokens count those found in the cache (56.3%). The
profile is a short trace, in which the power limit does not slow the clocks yet.
"""

from dataclasses import dataclass, replace

from dsv3_megatron.plan.deepseek import SIZES
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.serve.job import ServingJob
from dsv3_megatron.plan.serve.result import serve
from dsv3_megatron.specs.deployment import Deployment

__all__ = ["MEASURED", "Measured", "error_rows"]

_OVERVIEW = "DeepSeek-V3/R1 Inference System Overview, deepseek-ai/open-infra-index"
_PROFILE = "deepseek-ai/profile-data, as LMSYS converts it (blog of 2025-05-05)"
_LMSYS = "LMSYS, Deploying DeepSeek with PD Disaggregation and Large-Scale Expert Parallelism on 96 H100 (2025-05-05)"


@dataclass(frozen=True)
class Measured:
    """One published throughput.

    Attributes:
        node_tokens_per_s: of eight GPUs.
        half: "fitted" where a constant was chosen by it, else "judge".
        assumed: what the source leaves open.
    """

    name: str
    job: ServingJob
    node_tokens_per_s: float
    source: str
    assumed: str
    half: str = "judge"


_H800 = GPUS["h800"]
_SHORT = replace(_H800, watts=_H800.achieved.full_watts)  # of a trace

_PREFILL = ServingJob(
    sizes=SIZES,
    gpu=_H800,
    num_gpus=32,
    tp=1,
    phase="prefill",
    deployment=Deployment(32, False, True, 2),
    context=4096,
    batch=4,  # 16384 tokens per GPU
    weights="fp8",
    absorbed_prefill=False,
)
_DECODE = replace(
    _PREFILL, num_gpus=144, phase="decode", deployment=Deployment(32, False, True, 2), context=4989, batch=86
)
MEASURED = (
    Measured(
        "DeepSeek, prefill, EP32, a day's average",
        replace(_PREFILL, cached=0.563),
        73_700,
        _OVERVIEW,
        "prompts of 4096 tokens, 4 at a time per GPU, no drafts",
    ),
    Measured(
        "DeepSeek, decode, EP144, a day's average",
        _DECODE,
        14_800,
        _OVERVIEW,
        "86 requests per GPU: 14.8k tokens/s per node at the 20–22 tokens/s that a user gets; no drafts",
    ),
    Measured(
        "DeepSeek's profile, prefill, EP32",
        replace(_PREFILL, gpu=_SHORT),
        62_713,
        _PROFILE,
        "prompts of 4096 tokens, 16384 tokens per GPU",
    ),
    Measured(
        "DeepSeek's profile, decode, EP128",
        replace(
            _DECODE,
            gpu=_SHORT,
            num_gpus=128,
            deployment=Deployment(0, False, True, 2),
            context=4096,
            batch=128,
        ),
        18_598,
        _PROFILE,
        "experts without copies",
        "fitted",
    ),
    Measured(
        "SGLang, prefill, EP32, prompts of 4096",
        replace(_PREFILL, gpu=GPUS["h100"]),
        50_302,
        _LMSYS,
        "16384 tokens per GPU",
    ),
    Measured(
        "SGLang, decode, EP72, 256 requests of 2000",
        replace(_DECODE, gpu=GPUS["h100"], num_gpus=72, context=2050, batch=256),
        22_282,
        _LMSYS,
        "2000 tokens of input and half of 100 of output in the cache",
    ),
)


def error_rows() -> list[dict[str, object]]:
    """Predicted against published tokens/s of a node, with the sign of the error in percent."""
    rows: list[dict[str, object]] = []
    for one in MEASURED:
        predicted = serve(one.job).tokens_per_s_per_gpu * 8
        rows.append(
            {
                "name": one.name,
                "half": one.half,
                "published_tokens_per_s_per_node": one.node_tokens_per_s,
                "predicted_tokens_per_s_per_node": predicted,
                "error_percent": 100 * (predicted / one.node_tokens_per_s - 1),
                "source": one.source,
                "assumed": one.assumed,
            }
        )
    return rows
