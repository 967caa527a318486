"""Foreign options whose meaning depends on others: from all options of a script to Megatron's words, and why."""

import re
from collections.abc import Mapping

from dsv3_megatron.arguments.command_line import pattern
from dsv3_megatron.pipeline.placement import layer_layout
from dsv3_megatron.pipeline.traits import TRAITS

__all__ = ["RULES", "Blocked", "Options", "integer", "stages_without"]

Options = Mapping[str, list[str]]
Result = tuple[list[str], str]


class Blocked(ValueError):
    """What the option asks for cannot be had; the text says why."""


def integer(options: Options, name: str, default: int = 0) -> int:
    """A whole number among the options; `default` where it is not given or not known."""
    values = options.get(name) or []
    return int(values[-1]) if values and re.fullmatch(r"-?\d+", values[-1]) else default


def _num_layers(options: Options) -> int:
    """Layers that compute: without MindSpeed's empty ones."""
    return integer(options, "--num-layers") - len(_noop(options))


def _noop(options: Options) -> list[int]:
    text = ",".join(options.get("--noop-layers") or [])
    return [int(number) for number in re.findall(r"\d+", text)]


def dense_layers(values: list[str], options: Options) -> Result:
    layers, dense = _num_layers(options), int(values[0])
    words = ["--moe-layer-freq", pattern([0] * min(dense, layers) + [1] * max(0, layers - dense))]
    return words, f"the first {dense} of {layers} layers are dense"


def shared_experts(values: list[str], options: Options) -> Result:
    if "--moe-shared-expert-intermediate-size" in options:
        return [], "--moe-shared-expert-intermediate-size says it"
    size = integer(options, "--moe-ffn-hidden-size") or integer(options, "--moe-intermediate-size")
    return [
        "--moe-shared-expert-intermediate-size",
        str(int(values[0]) * size),
    ], f"{values[0]} shared experts of {size}"


def rope_type(values: list[str], options: Options) -> Result:
    kind = values[0] if values else ""
    if kind in ("yarn", "plm"):
        words = ["--rope-type", "yarn"]
        factor = options.get("--rope-scaling-factor")
        return words + (["--rotary-scaling-factor", factor[0]] if factor else []), "YaRN, with its factor"
    if kind in ("", "none", "default"):
        return ["--rope-type", "rope"], "positions without scaling"
    raise Blocked(f"{kind}: DeepSeek-V3's long context is YaRN")


def noop_layers(values: list[str], options: Options) -> Result:
    layers = _num_layers(options)
    words = ["--num-layers", str(layers)]
    stages, chunks = integer(options, "--pipeline-model-parallel-size", 1), _chunks(options)
    if "--schedules-method" in options:
        chunks = 2  # a rank holds a stage of the way there and one of the way back
    if stages > 1:
        counts = stages_without(integer(options, "--num-layers"), stages * chunks, _noop(options))
        words += [
            "--pipeline-model-parallel-layout",
            layer_layout(counts, integer(options, "--mtp-num-layers")),
        ]
    return words, "empty layers are left out; the stages keep the others"


def stages_without(num_layers: int, stages: int, noop: list[int]) -> list[int]:
    """Layers of each stage when `noop` of `num_layers` evenly divided layers are empty."""
    if num_layers % stages:
        raise Blocked(f"{num_layers} layers do not divide into {stages} stages")
    each = num_layers // stages
    return [sum(layer not in noop for layer in range(s * each, (s + 1) * each)) for s in range(stages)]


def _chunks(options: Options) -> int:
    if "--num-virtual-stages-per-pipeline-rank" in options:
        return integer(options, "--num-virtual-stages-per-pipeline-rank", 1)
    per_chunk = integer(options, "--num-layers-per-virtual-pipeline-stage")
    stages = integer(options, "--pipeline-model-parallel-size", 1)
    return integer(options, "--num-layers") // (stages * per_chunk) if per_chunk else 1


def layer_list(values: list[str], options: Options) -> Result:
    counts = [int(number) for number in re.findall(r"\d+", ",".join(values))]
    layout = layer_layout(counts, integer(options, "--mtp-num-layers"))
    return ["--pipeline-model-parallel-layout", layout], "the stages' layers in Megatron's notation"


def schedule(values: list[str], options: Options) -> Result:
    if values and values[0].lower() in TRAITS and TRAITS[values[0].lower()].folded:
        return [
            "--pipeline-schedule",
            values[0].lower(),
        ], "the same schedule; its stages are placed by themselves"
    raise Blocked(f"{' '.join(values)}: the schedules here are {', '.join(TRAITS)}")


def overlap(values: list[str], options: Options) -> Result:
    if "--schedules-method" in options:
        return [], "--pipeline-schedule overlaps its pairs by itself"
    if integer(options, "--expert-model-parallel-size", 1) > 1:
        return ["--overlap-moe-expert-parallel-comm"], "Megatron's overlapped pair"
    return [], "there is no expert parallelism, so nothing to overlap"


def patch_tokenizer(values: list[str], options: Options) -> Result:
    words = ["--tokenizer-type", "HuggingFaceTokenizer"]
    folder = options.get("--load") or options.get("--pretrained-checkpoint")
    if "--tokenizer-model" in options or not folder:
        return words, "the released tokenizer"
    return [*words, "--tokenizer-model", " ".join(folder)], "the released tokenizer, which it finds in --load"


def extra_vocabulary(values: list[str], options: Options) -> Result:
    if "--padded-vocab-size" in options or "--vocab-size" in options:
        return [], "the embedding's rows are given"
    if (integer(options, "--num-experts"), integer(options, "--hidden-size")) == (256, 7168):
        return ["--padded-vocab-size", "129280"], "the release's table: its tokenizer and these rows"
    return (
        [],
        "--padded-vocab-size is the number of rows of a release's table (vocab_size of its config.json)",
    )


def train_mode(values: list[str], options: Options) -> Result:
    if values and values[0] == "finetune":
        raise Blocked(
            "fine-tuning reads conversations: --sft-data DIR by python -m dsv3_megatron.sft.prepare"
        )
    return [], "pre-training is what there is without --sft-data"


def attention_sink(values: list[str], options: Options) -> Result:
    if values and values[0] not in ("0", "none"):
        raise Blocked("DeepSeek-V3's attention has no sink")
    return [], "there is none"


def _recompute(module: str, options: Options) -> Result:
    if (options.get("--recompute-granularity") or [""])[0] == "full":
        return [], "whole layers are recomputed already"
    wanted = {
        "moe_act": ("--recompute-activation-function", "--moe-zero-memory"),
        "mla_up_proj": ("--recompute-mla-up-proj",),
        "layernorm": ("--recompute-norm",),
    }
    modules = [name for name, options_ in wanted.items() if any(option in options for option in options_)]
    modules = list(dict.fromkeys([*(options.get("--recompute-modules") or []), *modules]))
    return [
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        *modules,
    ], f"{module} in Megatron's words"


def recompute_activation(values: list[str], options: Options) -> Result:
    return _recompute("moe_act", options)


def recompute_mla(values: list[str], options: Options) -> Result:
    return _recompute("mla_up_proj", options)


def recompute_norm(values: list[str], options: Options) -> Result:
    return _recompute("layernorm", options)


def lora(values: list[str], options: Options) -> Result:
    raise Blocked("there is no LoRA here: all weights are trained")


def another_model(values: list[str], options: Options) -> Result:
    raise Blocked("it makes another model than --spec dsv3 trains")


RULES = {
    function.__name__: function
    for function in (
        dense_layers, shared_experts, rope_type, noop_layers, layer_list, schedule, overlap, extra_vocabulary,
        train_mode, patch_tokenizer, attention_sink, recompute_activation, recompute_mla, recompute_norm,
        lora, another_model,
    )
}  # fmt: skip
