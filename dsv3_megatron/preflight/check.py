"""The stages of a check, in the order in which a job goes through them; a stage that fails ends it."""

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from dsv3_megatron.arguments.surroundings import imagined
from dsv3_megatron.checkpoint.host_memory import of_job, parameters_held, problem
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.preflight import findings
from dsv3_megatron.preflight.advice import advise
from dsv3_megatron.preflight.findings import Finding
from dsv3_megatron.preflight.line import Line
from dsv3_megatron.preflight.machine import Machine
from dsv3_megatron.preflight.start import with_packages_of


@dataclass(frozen=True)
class Job:
    """A launch line on a machine.

    Attributes:
        words: of `dsv3_megatron.train`, without `--device`.
        nodes, per_node: its size.
        on_cpu: `--device cpu`.
        env: variables the job will have.
        trainer: who parses the words ("hydra" is our trainer too).
        host_memory: GB of a machine, None where nobody says.
    """

    words: tuple[str, ...]
    nodes: int
    per_node: int
    on_cpu: bool
    env: dict[str, str]
    trainer: str
    host_memory: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


def examine(line: Line, machine: Machine, build: bool = True) -> list[Finding]:
    """Everything there is to say of a launch line. Needs a process that `start.become` prepared.

    Args:
        build: also make Megatron's groups and the model of the first and last stage.
    """
    found = [Finding("info", "launch line", note) for note in line.notes]
    try:
        job, more = job_of(line, machine)
        found += more
        around = machine.surroundings(job.world_size, job.per_node, job.env, job.on_cpu)
        with imagined(around), mock.patch.dict(os.environ, job.env):
            args = _completed(job)
            found += _files(args)
            if job.on_cpu:
                found.append(
                    Finding("info", "--device cpu", "the job runs on CPU: nothing of a GPU was checked")
                )
            else:
                found += advise(args, around, job.env)
            with with_packages_of(machine):
                found += _configured(job)
                if build and findings.ok(found):
                    found += _built(job, machine, args)
    except RefusedArgument as error:
        found += findings.from_message(str(error))
    except Exception as error:  # the job would end there too, and say it so
        from dsv3_megatron.arguments import megatron_parser
        from dsv3_megatron.arguments.failures import explain

        found += findings.from_message(explain(error, megatron_parser()))
    return found


def job_of(line: Line, machine: Machine) -> tuple[Job, list[Finding]]:
    """The job: its size from the machine, else from the launcher, else the smallest that its layout fits.

    Raises:
        RefusedArgument: the trainer's own words cannot be read, or the sizes do not fit each other.
    """
    env = {**machine.env, **line.env}
    nodes, per_node = machine.nodes or line.nodes, machine.gpus_per_node or line.per_node
    words, on_cpu, host = list(line.words), False, None
    if line.trainer == "hydra":
        words, on_cpu, nodes, per_node, host = _from_hydra(words, nodes, per_node)
    elif line.trainer == "train":
        words, on_cpu = _without_device(words)
    asked = next((word for word in words if word in ("-h", "--help")), None)
    if asked is not None:
        raise RefusedArgument(f"{asked}: the job would print its options and end. Use the line without it")
    found: list[Finding] = []
    if nodes is None:
        per_node = per_node or 8
        least = _least_world(words)
        nodes = max(1, -(-least // per_node))
        if least < per_node:
            per_node = least
        found.append(
            Finding(
                "info",
                "nodes",
                f"the line does not say how large the job is: checked for {nodes} × {per_node} processes",
                "nodes=N gpus_per_node=M before the line",
            )
        )
    host = machine.host_memory or host
    return Job(tuple(words), nodes, per_node or 8, on_cpu, env, line.trainer, host), found


def _from_hydra(
    overrides: Sequence[str], nodes: int | None, per_node: int | None
) -> tuple[list[str], bool, int, int, float | None]:
    from dsv3_megatron.conf import compose
    from dsv3_megatron.conf.argv import to_megatron_argv

    processes = None if nodes is None else nodes * (per_node or 8)
    cfg = compose(list(overrides), processes)
    return (
        to_megatron_argv(cfg),
        cfg.get("device") == "cpu",
        int(cfg.cluster.nodes),
        int(cfg.cluster.gpus_per_node),
        cfg.cluster.get("host_memory_gb"),
    )


def _without_device(words: Sequence[str]) -> tuple[list[str], bool]:
    from dsv3_megatron.arguments.device import split_device
    from dsv3_megatron.cpu import CPU_FLAGS

    device, rest = split_device(words)
    return (list(rest), False) if device == "cuda" else ([*CPU_FLAGS, *rest], True)


def _least_world(words: Sequence[str]) -> int:
    import math

    from dsv3_megatron.arguments.command_line import megatron_parser, parse_given

    given = vars(parse_given(megatron_parser(), words, known_only=True))
    tp, cp, pp, ep = (
        given.get(name, 1)
        for name in (
            "tensor_model_parallel_size",
            "context_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
    )
    return pp * math.lcm(tp * cp, ep * (given.get("expert_tensor_parallel_size") or tp))


def _completed(job: Job) -> Namespace:
    """The completed command line, parsed; everything of ours that refuses has done so."""
    from dsv3_megatron.arguments import complete, megatron_parser
    from dsv3_megatron.arguments.command_line import parse

    parser = megatron_parser()
    words = list(job.words)
    if job.trainer == "pretrain_gpt":
        from dsv3_megatron.arguments.complete import FULL_SPEC
        from dsv3_megatron.arguments.entry import refuse_what_only_our_trainer_does
        from dsv3_megatron.arguments.unpatched import check_command_line

        if not any(word.partition("=")[0] == "--spec" for word in words):
            raise RefusedArgument(
                "pretrain_gpt.py without --spec: it would train Megatron's own GPT. Use --spec dsv3 for this model"
            )
        if any(words[i : i + 3] == ["--spec", *FULL_SPEC] for i in range(len(words))):
            check_command_line(words)
        completed = complete(words, parser, known_only=True)
        args = parse(parser, completed, known_only=True)
        refuse_what_only_our_trainer_does(args)
        return args
    return parse(parser, complete(words, parser))


def _files(args: Namespace) -> list[Finding]:
    """What is read from disks that this machine may not see."""
    named = {"--data-path": args.data_path or [], "--train-data-path": args.train_data_path or []}
    missing = [
        Finding("warning", option, f"{prefix}.bin is not seen from here", "a prefix of .bin and .idx files")
        for option, words in named.items()
        for prefix in words
        if not _is_number(prefix) and not Path(prefix + ".bin").is_file()
    ]
    tokenizer = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and tokenizer and not Path(tokenizer).exists():
        missing.append(
            Finding(
                "warning", "--tokenizer-model", f"{tokenizer} is not seen from here", "a tokenizer's folder"
            )
        )
    return missing


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _configured(job: Job) -> list[Finding]:
    """Patches, Megatron's validation, and every configuration that the trainer makes of the arguments."""
    from dsv3_megatron import metrics, optimizer
    from dsv3_megatron.dryrun.world import megatron_args, model_config
    from dsv3_megatron.ema.trainer import install as keep_average
    from dsv3_megatron.patching import PatchMismatch, repairs
    from dsv3_megatron.recipe.install import install as follow_schedules

    try:
        repairs.install()
        optimizer.install()
        metrics.install()
        follow_schedules()
        keep_average()
    except PatchMismatch as error:
        return [Finding("error", "megatron-core", " ".join(str(error).split()), "a supported version")]
    try:
        with _quiet():
            args = megatron_args(list(job.words), 0, job.world_size, job.per_node)
            from megatron.training.training import get_megatron_optimizer_config

            model = model_config(args)
            _container(args, model)
            get_megatron_optimizer_config(args)
    except RefusedArgument as error:
        refused = str(error).removeprefix("Megatron refuses the arguments: ")
        return [findings.from_megatron(ValueError(refused))]
    except (AssertionError, ValueError, RuntimeError, ImportError) as error:
        return [findings.from_megatron(error)]
    finally:
        _forget_schedule()
    return []


def _container(args: Namespace, model: Any) -> Any:
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    return pretrain_cfg_container_from_args(args, model)


def _built(job: Job, machine: Machine, args: Namespace) -> list[Finding]:
    """Megatron's groups at the job's size, and the model of the first and the last stage, on the meta device."""
    from dsv3_megatron.dryrun.world import FakeWorld

    found: list[Finding] = []
    own = args.transformer_impl == "local" or machine.te_is_here()
    if not own and not job.on_cpu:
        version = machine.te_version()
        found.append(
            Finding(
                "info",
                "transformer-engine",
                f"version {version} is not installed here: the model was built from the reference backend's modules, "
                "which have the same parameters; Transformer Engine's constructors were not called",
            )
        )
    try:
        with (
            _quiet(),
            FakeWorld(list(job.words), job.world_size - 1, job.world_size, job.per_node, own) as world,
        ):
            held = [
                parameters_held(world.build_chunks(position))
                for position in sorted({0, world.groups.pp.size() - 1})
            ]
        found += _host_memory(job, machine, args, max(held, key=sum))
    except (AssertionError, ValueError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        found.append(findings.from_megatron(error))
    return found


def _host_memory(job: Job, machine: Machine, args: Namespace, held: tuple[float, float]) -> list[Finding]:
    """Whether checkpoints fit the machines; where it is not said how large they are, what that takes."""
    if not args.use_distributed_optimizer or not (args.save or args.optimizer_cpu_offload):
        return []
    memory = of_job(args, *held, job.per_node, job.world_size)
    if job.host_memory is None:
        what = "checkpoints and what is offloaded" if memory.optimizer else "checkpoints"
        takes = f"a machine needs {memory.peak / 1e9:.0f} GB for {what}; nobody says how much it has"
        return [Finding("info", "host memory", takes, "host_memory=GB before the line, to have it checked")]
    wrong = problem(memory, job.host_memory * 1e9, args.distrib_optim_fully_reshardable_mem_efficient)
    return [] if wrong is None else [Finding("error", *wrong)]


def _forget_schedule() -> None:
    from dsv3_megatron import dualpipe

    dualpipe.activate("1f1b", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron prints its arguments to stdout, which belongs to the findings."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        yield
