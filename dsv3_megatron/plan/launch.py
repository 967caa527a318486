"""A GPU job's arguments as its trainer would have them: checked as `dsv3 preflight` checks them, without its GPUs.

Three forms of a job: words of `dsv3_megatron.train` (our Hydra configurations become such words), a launch line, a
launch script. A line of Megatron's own, without `--spec dsv3`, goes through Megatron's parser and validation alone:
it is planned as it is. The packages are thought to be there (Transformer Engine, DeepEP, Apex), in the newest version
known.
"""

import contextlib
import math
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from dsv3_megatron.adopt.launcher import OF_STEP, environment, size, without_shell
from dsv3_megatron.adopt.translate import HYDRA, Launch, options_of, program_at, translate
from dsv3_megatron.arguments.command_line import choices_of
from dsv3_megatron.arguments.refusals.machine import wants_one_connection
from dsv3_megatron.arguments.requirements import TE, USES, version_key
from dsv3_megatron.arguments.surroundings import MAX_CONNECTIONS, imagined
from dsv3_megatron.errors import RefusedArgument, told
from dsv3_megatron.plan.counting import quiet
from dsv3_megatron.plan.environment import attention_of, not_planned
from dsv3_megatron.plan.hardware import gpu_named
from dsv3_megatron.plan.job import RECOMPUTE_MODULES, PlanError, refuse_batch
from dsv3_megatron.plan.options import SIZES
from dsv3_megatron.plan.unplanned import refuse_model
from dsv3_megatron.preflight.line import SHELL, Line, NoTrainer, read
from dsv3_megatron.preflight.machine import GPUS, Machine
from dsv3_megatron.preflight.start import with_packages_of

# Of a line that says nothing; preflight's.
DEFAULT_GPU = "h100"
# DeepSeek-V3's rows of the embedding, where the line leaves it to a tokenizer, which is on the cluster.
VOCABULARY = 129_280
_NO_TRAINER = (
    "starts no trainer that can be planned; use pretrain_gpt.py with Megatron's arguments, -m dsv3_megatron.train or "
    "-m dsv3_megatron.train_hydra"
)
_EXAMPLES = dict(zip(SIZES, ("gpu=h100", "nodes=16", "gpus_per_node=8"), strict=True))
# Files, tokenizers and reports: nothing of a step depends on them, and they are on the cluster. Ramps: a plan is of one
# step, at the full batch.
_ELSEWHERE = (
    "data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path",
    "data_cache_path", "load", "save", "pretrained_checkpoint", "tokenizer_model", "tensorboard_dir",
    "wandb_project", "wandb_exp_name", "wandb_save_dir", "batch_ramp", "rampup_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """Arguments of rank 0.

    Attributes:
        args: as Megatron's validation leaves them.
        given: what the words say, before that.
        world, per_node: ranks of the job, of a machine.
        gpu: a name of the hardware table.
        notes: what was assumed or left out.
    """

    args: Namespace
    given: Namespace
    world: int
    per_node: int
    gpu: str
    notes: tuple[str, ...] = ()


def machine_of(gpu: str, env: Mapping[str, str] | None = None) -> Machine:
    """One that has everything, in the newest version that is asked for."""
    newest = max((use.since for use in USES if use.package == TE), key=version_key)
    known = gpu if gpu in GPUS else DEFAULT_GPU
    return Machine(te=newest, apex="present", deepep="present", gpu=known, env=dict(env or {}))


def launched(
    words: Sequence[str],
    world: int,
    per_node: int,
    gpu: str,
    env: Mapping[str, str] | None = None,
    ours: bool = True,
) -> Launched:
    """Validate the words of a trainer.

    Raises:
        RefusedArgument: our refusals, or Megatron's own words.
    """
    from dsv3_megatron import dualpipe
    from dsv3_megatron.arguments import megatron_parser
    from dsv3_megatron.arguments.command_line import parse_given
    from dsv3_megatron.dryrun.world import megatron_args, model_config

    given = parse_given(megatron_parser(), words, known_only=True)
    refuse_sizes(vars(given))
    refuse_modules(getattr(given, "recompute_modules", None) or ())
    refuse_model(given)
    _refuse_precision_and_batch(vars(given), world)
    if not ours:  # before Megatron speaks of what these need
        refuse_attention(getattr(given, "multi_latent_attention", False))
        refuse_fsdp(given)
        if getattr(getattr(given, "attention_backend", None), "name", "") == "local":
            raise PlanError(
                "attention_backend=local: Megatron takes it with --spec local alone; use --attention-backend unfused"
            )
    machine, env = machine_of(gpu, env), dict(env or {})
    env.setdefault(MAX_CONNECTIONS, _connections(words, machine))
    env.setdefault("NVTE_CPU_OFFLOAD_V1", "1")  # Megatron asks for it with offloading; nothing else reads it
    notes: tuple[str, ...] = ()
    try:
        with quiet(), as_on(machine, world, per_node, env):
            if ours:
                args = megatron_args(list(words), 0, world, per_node)
            else:
                args, notes = _megatrons_own(words, world, per_node)
            model_config(args)
    except RefusedArgument:
        raise
    except (AssertionError, ValueError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise PlanError(f"Megatron refuses the arguments: {' '.join(told(error).split())}") from error
    except (ArithmeticError, LookupError) as error:
        raise PlanError(
            f"Megatron cannot make anything of these sizes ({type(error).__name__}: {error})"
        ) from error
    finally:
        dualpipe.activate("1f1b", None)
    return Launched(args, given, world, per_node, gpu, notes=notes)


# What sizes can be at all; Megatron divides by some before it looks.
_LEAST = {
    "hidden_size": 1, "num_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 1, "q_lora_rank": 0, "qk_head_dim": 1,
    "qk_pos_emb_head_dim": 1, "v_head_dim": 1, "ffn_hidden_size": 1, "moe_ffn_hidden_size": 1,
    "moe_shared_expert_intermediate_size": 0, "num_experts": 1, "moe_router_topk": 1, "vocab_size": 1,
    "padded_vocab_size": 1, "seq_length": 1, "micro_batch_size": 1, "global_batch_size": 1, "mtp_num_layers": 0,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1, "nvlink_domain_size": 1,
    "recompute_num_layers": 0, "communication_sms": 1, "moe_flex_dispatcher_num_sms": 1, "moe_deepep_num_sms": 1,
    "moe_hybridep_num_sms": 1, "optimizer_offload_fraction": 0,
}  # fmt: skip


def refuse_sizes(said: Mapping[Any, Any]) -> None:
    """PlanError for a size that cannot be, by its argument."""
    for name, low in _LEAST.items():
        value = said.get(name)
        if isinstance(value, int | float) and value < low:
            raise PlanError(f"{name}={value}: a number of at least {low} is needed")
    fraction, capacity = said.get("optimizer_offload_fraction"), said.get("moe_expert_capacity_factor")
    if isinstance(fraction, int | float) and fraction > 1:
        raise PlanError(f"optimizer_offload_fraction={fraction}: use a number from 0 to 1")
    if isinstance(capacity, int | float) and capacity == 0:
        raise PlanError("moe_expert_capacity_factor=0: an expert would take no token; use a number above 0")
    topk, experts = said.get("moe_router_topk"), said.get("num_experts")
    if isinstance(topk, int) and isinstance(experts, int) and topk > experts:
        raise PlanError(
            f"moe_router_topk={topk}: there are num_experts={experts}; use a number of at most {experts}"
        )


def _refuse_precision_and_batch(said: Mapping[str, Any], world: int) -> None:
    """PlanError for what Megatron refuses with a bare assertion, or in the words of evaluation's options."""
    if said.get("bf16") and said.get("fp16"):
        raise PlanError("bf16 and fp16 are both given: leave one out")
    batch, micro = said.get("global_batch_size"), said.get("micro_batch_size")
    kinds = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    replicas = world // math.prod(said.get(kind) or 1 for kind in kinds)
    if batch and micro and replicas:
        refuse_batch(batch, micro, replicas)


def refuse_attention(latent: bool) -> None:
    """PlanError for a model without multi-latent attention."""
    if not latent:
        raise PlanError(
            "multi_latent_attention is off: the planner knows multi-latent attention; use --multi-latent-attention"
        )


def refuse_fsdp(args: Namespace) -> None:
    """PlanError for sharded parameters."""
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name, False):
            raise PlanError(
                f"{name}=true: the planner knows the distributed optimizer, not FSDP; leave {name} out"
            )


def refuse_modules(modules: Sequence[str]) -> None:
    """PlanError for a name that is none of `--recompute-modules`."""
    unknown = [name for name in modules if name not in RECOMPUTE_MODULES]
    if unknown:
        raise PlanError(
            f"recompute_modules={','.join(unknown)}: no such module; use one or more of {', '.join(RECOMPUTE_MODULES)}"
        )


@contextlib.contextmanager
def as_on(machine: Machine, world: int, per_node: int, env: Mapping[str, str]) -> Iterator[None]:
    """While inside, our checks and Megatron's see the job's GPU, packages and variables."""
    from dsv3_megatron.cpu import devices

    gpu, before = devices.gpu, (devices.gpu.major, devices.gpu.minor)
    gpu.major, gpu.minor = machine.capability()
    around = machine.surroundings(world, per_node, env, on_cpu=False)
    try:
        with imagined(around), mock.patch.dict(os.environ, env), with_packages_of(machine):
            yield
    finally:
        gpu.major, gpu.minor = before


def _connections(words: Sequence[str], machine: Machine) -> str:
    """CUDA_DEVICE_MAX_CONNECTIONS that the run needs, where the line does not say; it costs a step nothing here."""
    from dsv3_megatron.arguments import megatron_parser
    from dsv3_megatron.arguments.command_line import parse

    args = parse(megatron_parser(), words, known_only=True)
    around = machine.surroundings(1, 1, {}, on_cpu=False)
    return "1" if wants_one_connection(args, around) else "32"


def _megatrons_own(words: Sequence[str], world: int, per_node: int) -> tuple[Namespace, tuple[str, ...]]:
    """Through Megatron's parser and validation alone."""
    from megatron.training import arguments

    from dsv3_megatron.arguments import add_arguments, megatron_parser

    words, loss = _without_te_loss(words)
    words = [word for word in words if word]  # an empty expansion is no option
    _, unknown = megatron_parser().parse_known_args(words)
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(per_node)}
    with mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", ["plan", *words]):
        args = arguments.parse_args(extra_args_provider=add_arguments, ignore_unknown_args=True)
        arguments.validate_args(args)
    if loss:
        args.cross_entropy_loss_fusion, args.cross_entropy_fusion_impl = True, "te"
    notes = (f"left out, not known to Megatron 0.19: {' '.join(unknown)}",) if unknown else ()
    return args, (*loss, *notes)


def _without_te_loss(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words with Megatron's own fused loss, and what to say, where they ask for Transformer Engine's: public lines
    do, Megatron 0.19 refuses it, and what the loss costs is known."""
    option, kept, found = "--cross-entropy-fusion-impl", list(words), False
    for i, word in enumerate(kept):
        if word == f"{option}=te" or (word == "te" and i and kept[i - 1] == option):
            kept[i], found = word.removesuffix("te") + "native", True
    return kept, (f"{option} te: planned so, though Megatron 0.19 refuses to run it",) if found else ()


# --- launch lines and scripts


def of_line(text: str, said: Mapping[str, str]) -> Launched:
    """A launch line: torchrun … of our trainers or of Megatron's.

    Args:
        said: `gpu`, `nodes`, `gpus_per_node`, where the line does not say.
    """
    from dsv3_megatron.preflight.check import job_of

    for name in SIZES:
        if said.get(name) == "":
            raise PlanError(f"{name}=: a value is needed, such as {_EXAMPLES[name]}")
    line, gpu = _read(text, said), said.get("gpu")
    if line.trainer == "hydra" and gpu is None:
        from dsv3_megatron.conf import compose

        gpu = compose(list(line.words)).cluster.gpu
    gpu_named(gpu or DEFAULT_GPU, "gpu")
    notes = list(line.notes)
    machine = _size(machine_of(gpu or DEFAULT_GPU, line.env), said)
    sizes = (machine.nodes, line.nodes), (machine.gpus_per_node, line.per_node)
    for name, (other, its) in zip(SIZES[1:], sizes, strict=True):
        if other and its and other != its:
            notes.append(f"{name}={other}, in place of the line's {its}")
    options, _ = options_of(line.words)
    spec = options.get("--spec", [])
    ours = line.trainer != "pretrain_gpt" or spec[:1] == ["dsv3"]
    if not ours and spec:
        notes.append(f"--spec {' '.join(spec)}: layers are planned by the line's sizes")
    line = replace(line, words=tuple(_without_files(line.words, line.trainer, ours)))
    if not ours and not {"--vocab-size", "--padded-vocab-size"} & options.keys():
        notes.append(f"the vocabulary is the tokenizer's: {VOCABULARY:,} words are planned; use --vocab-size")
        line = replace(line, words=(*line.words, "--vocab-size", str(VOCABULARY)))
    job, found = job_of(line, machine)
    notes += [finding.why for finding in found]
    if gpu is None:
        notes.append(f"the line does not say which GPU: gpu={DEFAULT_GPU}; use gpu=NAME")
    if job.on_cpu:
        raise PlanError("--device cpu: the line is of a job on CPU, which has no times; leave it out")
    env = {
        name: value for name, value in job.env.items() if name == MAX_CONNECTIONS or name.startswith("NVTE_")
    }
    words, attention = attention_of(env, job.words)
    notes += [*attention, *not_planned(job.env)]
    result = launched(words, job.world_size, job.per_node, gpu or DEFAULT_GPU, env, ours)
    return replace(result, notes=(*notes, *result.notes))


def _read(text: str, said: Mapping[str, str]) -> Line:
    """The line's parts, without what is the shell's; its size also as Slurm says it."""
    try:
        words = shlex.split(re.sub(r"(\d>&\d)\s*(\|&?)\s*", r"\1 \2 ", text.replace("\\\n", " ")))
    except ValueError:
        return read([text])  # says what is wrong with it
    words = without_shell(words)
    if shells := [word for word in words if word in SHELL or word.endswith(";")]:
        raise PlanError(
            f"--launch: {shells[0]!r} joins commands or moves files; give the trainer's command alone, or all of it in "
            "a file with --script"
        )
    try:
        line = read(words if len(words) != 1 else [shlex.quote(words[0])])
    except NoTrainer as error:
        raise PlanError(f"--launch {text}: {_NO_TRAINER}") from error
    before = words[: program_at(words) or 0]
    per_node = said.get(SIZES[2], "")
    try:
        nodes, ranks = size(before, per_node=int(per_node) if per_node.isdecimal() else None)
    except ValueError as error:
        raise PlanError(f"--launch: {error}") from error
    env = {**line.env, **environment(before)}
    return replace(line, nodes=line.nodes or nodes, per_node=line.per_node or ranks, env=env)


def of_script(path: Path, said: Mapping[str, str]) -> Launched:
    """The one launch of a trainer in a shell script, as `dsv3 adopt` reads scripts.

    Args:
        said: as `of_line`; any other NAME is a variable that the script takes from its environment.
    """
    from dsv3_megatron.adopt.__main__ import ASK, launches_of
    from dsv3_megatron.arguments import megatron_parser

    variables = {name: value for name, value in said.items() if name not in SIZES}
    try:
        launches, notes = launches_of(path, (), variables)
    except RefusedArgument as error:
        asked = str(error).replace(ASK, "give variables of its environment as NAME=VALUE")
        raise PlanError(f"--script {asked}") from error
    if len(launches) > 1:
        places = ", ".join(where for where, _ in launches)
        raise PlanError(f"--script {path}: starts more than one trainer ({places}); plan one with --launch")
    _, launch = launches[0]
    if launch.program == HYDRA:  # files are on the cluster: any name will do
        words, more = [re.sub(r"\$\{(\d+)\}", r"/argument_\1", word) for word in launch.stray], list[str]()
    else:
        words, more = _words_of(launch, megatron_parser())
    nodes, ranks = (said.get(name) or number for name, number in zip(
        SIZES[1:], (launch.nodes, launch.ranks_per_node), strict=True))  # fmt: skip
    sizes = {
        name: str(value) for name, value in zip(SIZES[1:], (nodes, ranks), strict=True) if value is not None
    }
    prefix = (
        ["-m", launch.program] if launch.program in ("dsv3_megatron.train", HYDRA) else ["pretrain_gpt.py"]
    )
    prefix = [*(f"{name}={value}" for name, value in launch.env.items() if OF_STEP.fullmatch(name)), *prefix]
    found = of_line(shlex.join([*prefix, *words]), {**sizes, **{k: v for k, v in said.items() if k == "gpu"}})
    return replace(found, notes=(*notes, *more, *found.notes))


def _words_of(launch: Launch, parser: ArgumentParser) -> tuple[list[str], list[str]]:
    """Its options as Megatron takes them: as they are where it knows them, else by `dsv3 adopt`'s table of forks."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    notes: list[str] = []
    for (option, values), step in zip(launch.options.items(), translate(launch, parser), strict=True):
        action = known.get(option)
        if step.kind == "unknown value":
            raise PlanError(f"--script: {step.option}: {step.why.replace('--set ', '')}")  # adopt's option
        if option == "--spec" and values[:1] != ["dsv3"]:
            notes.append(f"--spec {' '.join(values)}: layers are planned by the script's sizes")
            continue
        choices = None if action is None else choices_of(action)
        if action is not None and (choices is None or set(values) <= set(map(str, choices))):
            words += (
                [option, *values] if not any(v.startswith("-") for v in values) else [f"{option}={values[0]}"]
            )
            continue
        words += step.words
        if step.kind in ("unknown", "impossible"):
            notes.append(f"{step.option}: {step.why}")
    return words, notes


def _size(machine: Machine, said: Mapping[str, str]) -> Machine:
    asked = Machine.of({name: said[name] for name in SIZES[1:] if name in said})
    return replace(machine, nodes=asked.nodes, gpus_per_node=asked.gpus_per_node)


def _without_files(words: Sequence[str], trainer: str, ours: bool) -> list[str]:
    """Without what names files and reports, with random data in their place."""
    if trainer == "hydra":
        return [*words, "batch_ramp=null"]
    # Megatron takes the vocabulary's size from a tokenizer; the spec of other layers is not here, the sizes say them.
    elsewhere = (*_ELSEWHERE, "tokenizer_type" if ours else "spec")
    kept, skipping, data = [], False, False
    for word in words:
        if word.startswith("--"):
            dest = word.partition("=")[0][2:].replace("-", "_")
            skipping = dest in elsewhere
            data = data or dest == "mock_data"
        if not skipping:
            kept.append(word)
    return [*kept, *([] if data else ["--mock-data"])]
