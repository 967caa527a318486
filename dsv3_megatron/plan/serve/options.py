"""`dsv3 plan serve`'s own NAME=VALUE words, and the job that they and a layout for serving make."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3_megatron.conf import compose
from dsv3_megatron.conf.argv import to_megatron_argv
from dsv3_megatron.conf.check import world_size
from dsv3_megatron.conf.serving import is_for_serving, serving_of
from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.plan.destinations import most_imbalance
from dsv3_megatron.plan.hardware import gpu_named
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.serve.job import ServingJob
from dsv3_megatron.plan.serve.result import DEFAULT_ACCEPTANCE, full, without_copies

__all__ = ["Options", "job_of", "parse"]

PREFILL_TOKENS = 16_384  # of a GPU in a pass, where no batch is given; as in DeepSeek's published profile
_CHOICES = {
    "output": ("table", "json"),
    "weights": ("bf16", "fp8"),
    "cache": ("bf16", "fp8"),
    "redundancy": ("on", "off"),
    "attention": ("absorbed", "expanded"),
}


@dataclass
class Options:
    """What the command line says; see `USAGE` of the command."""

    output: str = "table"
    weights: str = "bf16"
    cache: str = "bf16"
    redundancy: str = "on"
    attention: str = "absorbed"
    context: int = 4096
    batch: float | None = None
    imbalance: float = 1.0
    mtp: str = "off"
    cached: float = 0.0
    overrides: list[str] = field(default_factory=list)


def parse(argv: Sequence[str]) -> Options:
    """PlanError names the option, its value and what to use."""
    options = Options()
    for text in argv:
        name, equals, value = text.partition("=")
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise PlanError(f"{text}: use {name}={f' or {name}='.join(_CHOICES[name])}")
            setattr(options, name, value)
        elif name == "context":
            options.context = int(_number(text, value, 1, whole=True))
        elif name == "batch":
            options.batch = _number(text, value, 0, above=True)
        elif name == "imbalance":
            options.imbalance = _number(text, value, 1)
        elif name == "cached":
            options.cached = _number(text, value, 0, below=1)
        elif name == "mtp":
            if value not in ("on", "off"):
                _number(text, value, 0, most=1, more="mtp=on, mtp=off or ")
            options.mtp = value
        else:
            if not equals:
                raise PlanError(f"{text!r}: write NAME=VALUE, for instance layout=decode_tp4_dp80_ep320")
            options.overrides.append(text)
    return options


def _number(
    text: str,
    value: str,
    least: float,
    whole: bool = False,
    above: bool = False,
    below: float | None = None,
    most: float | None = None,
    more: str = "",
) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    holds = number > least if above else number >= least
    holds = holds and (below is None or number < below) and (most is None or number <= most)
    if not holds or number == float("inf") or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        bounds = f"above {least:g}" if above else f"from {least:g}"
        bounds += f" to below {below:g}" if below is not None else f" to {most:g}" if most is not None else ""
        raise PlanError(f"{text}: use {more}{kind} {bounds}")
    return number


def job_of(options: Options) -> ServingJob:
    """The job; PlanError and ConfigError name the word that is wrong."""
    cfg = compose(options.overrides, serving=True)
    to_megatron_argv(cfg)  # a word that neither we nor Megatron know would do nothing
    if not is_for_serving(cfg):
        named = [word for word in options.overrides if word.startswith("layout=")] or ["layout"]
        raise PlanError(
            f"{named[-1]}: is a layout for training; use layout=prefill_tp4_dp8_ep32 or layout=decode_tp4_dp80_ep320"
        )
    deployment, phase = serving_of(cfg), cfg.serving.phase
    sizes = _sizes(cfg)
    acceptance = None
    if options.mtp != "off":
        if phase == "prefill":
            raise PlanError(
                f"mtp={options.mtp}: drafts are of decoding; leave it out with a layout for prefill"
            )
        if not sizes.mtp_num_layers:
            raise PlanError(f"mtp={options.mtp}: the model has no MTP layer (mtp_num_layers); leave it out")
        acceptance = DEFAULT_ACCEPTANCE if options.mtp == "on" else float(options.mtp)
    if phase == "decode":
        for name, value, usual in (
            ("cached", options.cached, 0.0),
            ("attention", options.attention, "absorbed"),
        ):
            if value != usual:
                raise PlanError(f"{name}={value}: is of prefilling; leave it out with a layout for decode")
    job = ServingJob(
        sizes=sizes,
        gpu=gpu_named(cfg.cluster.gpu),
        num_gpus=world_size(cfg),
        tp=cfg.get("tensor_model_parallel_size") or 1,
        phase=phase,
        deployment=deployment,
        context=options.context,
        batch=options.batch or 0.0,
        weights=options.weights,
        cache=options.cache,
        imbalance=options.imbalance,
        acceptance=acceptance,
        absorbed_prefill=options.attention == "absorbed",
        cached=options.cached,
    )
    fullest = most_imbalance(job.num_gpus, job.slots_per_gpu, job.topk) if job.topk else 1.0
    if job.imbalance > fullest:
        raise PlanError(
            f"imbalance={job.imbalance:g}: the fullest of {job.num_gpus} GPUs has at most {fullest:g} times the mean; "
            f"use a number from 1 to {fullest:g}"
        )
    if options.redundancy == "off":
        job = without_copies(job)
    if options.batch is None:
        most = full(job)
        wanted = PREFILL_TOKENS / options.context if phase == "prefill" else most.batch
        job = replace(job, batch=min(wanted, most.batch))
    return job


def _sizes(cfg: Any) -> ModelSizes:
    """Sizes of a composed configuration."""
    experts = cfg.get("num_experts") or 0
    layers = cfg.num_layers
    if not cfg.get("kv_lora_rank"):
        raise PlanError("model: has no kv_lora_rank; the planner of serving knows models with a latent cache")
    return ModelSizes(
        num_layers=layers,
        num_moe_layers=sum(_pattern(cfg.get("moe_layer_freq"), layers)) if experts else 0,
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        q_lora_rank=cfg.get("q_lora_rank"),
        kv_lora_rank=cfg.kv_lora_rank,
        qk_head_dim=cfg.qk_head_dim,
        qk_pos_emb_head_dim=cfg.qk_pos_emb_head_dim,
        v_head_dim=cfg.v_head_dim,
        ffn_hidden_size=cfg.ffn_hidden_size,
        moe_ffn_hidden_size=cfg.get("moe_ffn_hidden_size") or 0,
        moe_shared_expert_intermediate_size=cfg.get("moe_shared_expert_intermediate_size") or 0,
        moe_router_topk=cfg.get("moe_router_topk") or 0,
        num_moe_experts=experts,
        padded_vocab_size=cfg.get("padded_vocab_size") or cfg.get("vocab_size"),
        seq_length=cfg.get("seq_length") or 4096,
        mtp_num_layers=cfg.get("mtp_num_layers") or 0,
    )


def _pattern(frequency: Any, layers: int) -> list[int]:
    """Whether each layer is MoE, from Megatron's --moe-layer-freq: a number, or a Python list as text."""
    from megatron.training.arguments import moe_freq_type

    value = moe_freq_type(str(frequency if frequency is not None else 1))
    if isinstance(value, int):
        return [int(layer % value == 0) for layer in range(layers)]
    if len(value) != layers:
        raise PlanError(
            f"moe_layer_freq={frequency}: has {len(value)} entries, num_layers={layers}; give one each"
        )
    return [int(entry) for entry in value]
