"""From the trainer's configuration or a launch line to a `Job`: what is planned is what would be launched.

The arguments go through the trainer's own refusals and Megatron's own validation, as those of the GPUs' job and at the
real world size (`launch.py`).
"""

from argparse import Namespace
from dataclasses import dataclass

from omegaconf import DictConfig

from dsv3_megatron.checkpoint.host_memory import HostMemory, host_memory
from dsv3_megatron.conf.argv import to_megatron_argv
from dsv3_megatron.conf.check import world_size
from dsv3_megatron.plan.counting import count_parameters
from dsv3_megatron.plan.from_args import job_of, sizes_of
from dsv3_megatron.plan.hardware import Gpu, gpu_named
from dsv3_megatron.plan.job import Job
from dsv3_megatron.plan.launch import Launched, launched, refuse_modules, refuse_sizes
from dsv3_megatron.plan.parameters import ParameterCounts, counts_of_sizes, held_by


@dataclass(frozen=True)
class Planned:
    """A configuration as the planner takes it.

    Attributes:
        host: what a machine needs of its own memory, None without a distributed optimizer.
        host_available: bytes of a machine, None where the cluster does not say.
        memory_efficient: `--distrib-optim-fully-reshardable-mem-efficient`.
        notes: what was assumed of the launch.
    """

    job: Job
    gpu: Gpu
    counts: ParameterCounts
    host: HostMemory | None = None
    host_available: float | None = None
    memory_efficient: bool = False
    notes: tuple[str, ...] = ()


def from_config(cfg: DictConfig, load_imbalance: float | None) -> Planned:
    """For a configuration from `dsv3_megatron.conf.compose`; needs `dsv3_megatron.cpu.activate()`.

    Errors: RefusedArgument, from the trainer's own checks, Megatron's or the planner's.
    """
    gpu_named(cfg.cluster.gpu)
    found = validated(cfg)
    counts = count_parameters(cfg, found.args.tensor_model_parallel_size)
    gb = cfg.cluster.get("host_memory_gb")
    return _planned(found, counts, load_imbalance, None if gb is None else gb * 1e9)


def from_launch(found: Launched, load_imbalance: float | None) -> Planned:
    """For a launch line or a script, from `launch.of_line` or `launch.of_script`."""
    tp = found.args.tensor_model_parallel_size
    return _planned(found, counts_of_sizes(sizes_of(found), tp), load_imbalance, None)


def _planned(
    found: Launched, counts: ParameterCounts, load_imbalance: float | None, host_available: float | None
) -> Planned:
    args, gpu = found.args, gpu_named(found.gpu)
    job = job_of(found, counts.padded_vocab_size, load_imbalance)
    return Planned(
        job,
        gpu,
        counts,
        _host(args, found.per_node, job, counts) if args.use_distributed_optimizer else None,
        host_available,
        args.distrib_optim_fully_reshardable_mem_efficient,
        found.notes,
    )


def _host(args: Namespace, per_node: int, job: Job, counts: ParameterCounts) -> HostMemory:
    """Of a machine full of the fullest rank's like."""
    from dsv3_megatron.plan.step import schedule_of

    schedule = schedule_of(job)
    stages = [
        tuple(sorted({stage for stage, _ in schedule.stages_of(rank)})) for rank in range(schedule.num_ranks)
    ]
    held = max((held_by(job, counts, of_rank) for of_rank in stages), key=lambda h: h.experts + h.rest)
    shard = held.experts / job.layout.expert_shards + held.rest / job.layout.dense_shards
    return host_memory(
        held.experts,
        held.rest,
        per_node,
        dense_ranks_per_stage=job.layout.tp * job.layout.cp,
        reshardable=args.dist_ckpt_optim_fully_reshardable,
        memory_efficient=args.distrib_optim_fully_reshardable_mem_efficient,
        average=args.ema_decay is not None,
        async_save=args.async_save,
        offloaded=shard * job.offload_optimizer,
    )


def validated(cfg: DictConfig) -> Launched:
    """The arguments of rank 0 of the GPUs' job.

    Errors: RefusedArgument, from the trainer's refusals or Megatron's.
    """
    refuse_sizes(cfg)
    refuse_modules(cfg.get("recompute_modules") or ())
    words = to_megatron_argv(at_full_batch(cfg))
    return launched(words, world_size(cfg), cfg.cluster.gpus_per_node, cfg.cluster.gpu)


def at_full_batch(cfg: DictConfig) -> DictConfig:
    """Without a batch ramp: a plan is of one step, at global_batch_size. The ramp's own steps are planned one by one,
    with global_batch_size=…"""
    full = cfg.copy()
    for name in ("batch_ramp", "step_batch_size_schedule"):
        if full.get("global_batch_size") is not None and name in full:
            full[name] = None
    return full
