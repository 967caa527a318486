"""The user's launch line, shrunk until a laptop runs it: which options are kept, which get a small value, which go.

The rule (docs/prove.md): the *shape* of the run stays (schedule, parallel dimensions, router, MTP, optimizer,
recompute, balance, clipping, whatever is not named here); its *size* goes (widths, depth, experts, batch, steps); what
belongs to a cluster or a disk goes (data, tokenizer, checkpoints, logs, kernels).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.preflight.line import Line, read

__all__ = ["Shrunk", "shrink", "words_of"]

MAX_PROCESSES = 8
LAYERS = 4  # of each pipeline stage, the model's first one dense
BATCH = 16
# Parallel sizes: kept, at most 2 each; the later ones go to 1 first where it would still be more than MAX_PROCESSES.
_PARALLEL = {
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
}
# Sizes that every shrunk model has.
_SIZES = {
    "--hidden-size": 32, "--ffn-hidden-size": 64, "--num-attention-heads": 4, "--kv-lora-rank": 16,
    "--qk-head-dim": 16, "--qk-pos-emb-head-dim": 8, "--v-head-dim": 16, "--num-experts": 8,
    "--moe-ffn-hidden-size": 32, "--moe-router-topk": 4, "--vocab-size": 128, "--seq-length": 32,
    "--make-vocab-size-divisible-by": 64,  # as many rows of the embedding on two tensor-parallel ranks as on one
    "--max-position-embeddings": 32, "--init-method-std": 0.02, "--micro-batch-size": 1, "--eval-iters": 0,
    "--num-workers": 0, "--log-interval": 1, "--lr": 1e-3,
}  # fmt: skip
# Depend on sizes, cluster or disk.
_DROPPED_PREFIXES = (
    "data", "train-data", "valid-data", "test-data", "tokenizer", "vocab", "merge", "split", "save", "load", "ckpt",
    "pretrained", "tensorboard", "wandb", "log-", "logging", "profile", "use-pytorch-profiler", "nccl", "exit",
    "eval", "train-iters", "train-samples", "train-tokens", "lr-", "rampup", "batch-ramp", "last-lr", "min-lr", "lr",
    "distributed-", "num-layers", "num-virtual", "decoder-first", "decoder-last", "pipeline-model-parallel-layout",
    "moe-layer-freq", "padded-vocab", "make-vocab", "moe-shared-expert-intermediate-size", "num-workers", "async-save",
    "rerun", "straggler", "cuda-graph", "enable-cuda-graph", "global-batch-size", "q-lora-rank", "sft", "mock-data",
    "original-max-position-embeddings", "rotary-scaling-factor", "rope-type", "mscale", "beta-", "non-persistent",
    "one-logger", "timing", "manual-gc", "communication-sms", "moe-router-num-groups", "moe-router-group-topk",
    "transformer-impl", "recovery", "resil", "ema-", "expert-placement", "rank-timeout", "check-for",
    "moe-enable-deepep", "posttrain", "preference", "dpo-", "grpo-", "prompt-data", "reward", "rl-", "langrl",
    "app-tag", "pipeline-costs", "fault-injector", "config-logger", "memory-snapshot", "flight-recorder",
)  # fmt: skip
# Of whatever option: files, folders and addresses are not there on another machine.
_DROPPED_SUFFIXES = ("-path", "-dir", "-file", "-filename", "-cfg", "-map", "-url", "-addr", "-host", "-load")
_PRECISION = ("bf16", "fp16", "fp8", "first-last-layers-bf16", "main-grads", "main-params", "exp-avg", "grad-reduce",
              "accumulate-allreduce", "use-precision-aware", "params-dtype", "attention-softmax-in-fp32")  # fmt: skip
# Mean nothing in one process.
_OF_A_LAYOUT = (
    "pipeline-", "sequence-parallel", "overlap", "expert-tensor", "tp-comm", "moe-token-dispatcher-type",
    "nvlink-domain", "align-",
)  # fmt: skip


@dataclass
class Shrunk:
    """A line that a laptop runs.

    Attributes:
        words: of `dsv3_megatron.train`, with `--device cpu`, without steps and folders.
        world_size: processes.
        kept, set, dropped: options of the user's line as they stand, with another value, and left out.
        data_parallel: size.
        notes: what was changed for another reason.
    """

    words: list[str]
    world_size: int
    data_parallel: int
    kept: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """For a report: what was run, and how it differs from what the user gave."""
        return {
            "ran": f"{self.world_size} processes: {' '.join(self.words)}",
            "kept as given": " ".join(self.kept) or "nothing",
            "small values for": " ".join(self.set) or "nothing",
            "left out": " ".join(self.dropped) or "nothing",
            **({"notes": "; ".join(self.notes)} if self.notes else {}),
        }


def words_of(line: Sequence[str]) -> list[str]:
    """Megatron's words of a launch line, Hydra's overrides composed.

    Raises:
        RefusedArgument: it starts no trainer of ours, or its words cannot be read.
    """
    found: Line = read(list(line))
    if found.trainer == "hydra":
        from dsv3_megatron.conf import compose
        from dsv3_megatron.conf.argv import to_megatron_argv

        processes = None if found.nodes is None else found.nodes * (found.per_node or 8)
        return to_megatron_argv(compose(list(found.words), processes))
    from dsv3_megatron.arguments.device import split_device

    words = split_device(found.words)[1]
    return words if "--spec" in words else ["--spec", "dsv3", *words]


def shrink(line: Sequence[str], precision: bool = True, single: bool = False) -> Shrunk:
    """The shrunk line.

    Args:
        line: launch line, split as the shell does.
        precision: keep bf16 and FP8; else all is fp32.
        single: one process, without a pipeline schedule: what others are compared with.

    Raises:
        RefusedArgument: the line cannot be read, has an unknown option, or asks for what cannot be shrunk.
    """
    from dsv3_megatron.arguments import complete, megatron_parser
    from dsv3_megatron.arguments.command_line import parse_given
    from dsv3_megatron.dryrun.world import with_modules_everywhere

    words = words_of(line)
    parser = megatron_parser()
    given = vars(parse_given(parser, words))
    asked = {name: 1 if given.get(name) is None else int(given[name]) for name in _PARALLEL}
    for name, size in asked.items():
        if size < 1:
            raise RefusedArgument(f"{_PARALLEL[name]} {size}: must be 1 or more")
    sizes = {name: min(2, size) for name, size in asked.items()}
    whole = int(given.get("expert_tensor_parallel_size") or 0)
    expert_tensor = min(2, whole) or None  # the tensor-parallel size where the line does not say
    for name in reversed(_PARALLEL):
        if _world(sizes, expert_tensor) > MAX_PROCESSES:
            sizes[name] = 1
    layers = LAYERS * sizes["pipeline_model_parallel_size"]  # of the model, in one process too
    if single:
        sizes, expert_tensor = dict.fromkeys(sizes, 1), None
    schedule = "1f1b" if single else str(given.get("pipeline_schedule") or "1f1b")
    result = Shrunk([], _world(sizes, expert_tensor), 1)
    tp, cp, pp = (
        sizes[f"{name}_size"]
        for name in ("tensor_model_parallel", "context_parallel", "pipeline_model_parallel")
    )
    result.data_parallel = result.world_size // (tp * cp * pp)
    for option, values in _groups(words):
        name = option.removeprefix("--")
        gone = name.startswith(_DROPPED_PREFIXES) or name.endswith(_DROPPED_SUFFIXES)
        gone |= not precision and name.removeprefix("no-").startswith(_PRECISION)
        gone |= name in ("use-distributed-optimizer", "overlap-param-gather") and not precision
        gone |= single and name.startswith(_OF_A_LAYOUT)
        if option in (*_PARALLEL.values(), "--expert-tensor-parallel-size"):
            continue
        if option in _SIZES or (name == "lr"):
            result.set.append(option)
        elif gone:
            result.dropped.append(option)
        else:
            result.kept += [option, *values]
    groups = int(given.get("moe_router_num_groups") or 0)
    new: dict[str, Any] = {
        **_SIZES,
        "--num-layers": layers,
        "--moe-layer-freq": f"[0]*1+[1]*{layers - 1}",
        "--q-lora-rank": 0 if given.get("q_lora_rank", 1) in (0, None) else 16,
        "--global-batch-size": BATCH,
    }
    new |= {"--moe-router-num-groups": 4, "--moe-router-group-topk": 2} if groups != 1 else {
        "--moe-router-num-groups": 1, "--moe-router-group-topk": 1
    }  # fmt: skip
    for name, option in _PARALLEL.items():
        if sizes[name] > 1:
            new[option] = sizes[name]
        if asked[name] != sizes[name]:
            result.notes.append(f"{option} {asked[name]} became {sizes[name]}")
    if expert_tensor:
        new["--expert-tensor-parallel-size"] = expert_tensor
        if whole > expert_tensor:
            result.notes.append(f"--expert-tensor-parallel-size {whole} became {expert_tensor}")
    if schedule == "1f1b" and pp > 1 and _interleaved(given, asked["pipeline_model_parallel_size"]):
        new["--num-virtual-stages-per-pipeline-rank"] = 2
        result.notes.append("interleaved stages became 2 per rank")
    if schedule.startswith("dualpipe") and pp == 1:
        raise RefusedArgument(
            f"--pipeline-schedule {schedule}: needs --pipeline-model-parallel-size 2 or more"
        )
    small = [word for option, value in new.items() for word in (option, str(value))]
    result.words = ["--device", "cpu", *with_modules_everywhere([*result.kept, *small, "--mock-data"])]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(result.world_size)}
    with mock.patch.dict(os.environ, {**ranks, "LOCAL_WORLD_SIZE": str(result.world_size)}):
        complete(result.words[2:])  # what is refused is refused here, before a process is started
    return result


def _interleaved(given: dict[str, Any], stages: int) -> bool:
    """Whether a rank has several stages, as one of Megatron's three options says it."""
    layout = str(given.get("pipeline_model_parallel_layout") or "")
    layers = given.get("num_layers_per_virtual_pipeline_stage")
    return (
        int(given.get("num_virtual_stages_per_pipeline_rank") or 1) > 1
        or (layers is not None and layers * stages < int(given.get("num_layers") or 0))
        or layout.count("|") + 1 > stages
    )


def _world(sizes: dict[str, int], expert_tensor: int | None) -> int:
    tp, cp = sizes["tensor_model_parallel_size"], sizes["context_parallel_size"]
    experts = sizes["expert_model_parallel_size"] * (expert_tensor or tp)
    return sizes["pipeline_model_parallel_size"] * math.lcm(tp * cp, experts)


def _groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Options with their values."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found.append((option, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found
