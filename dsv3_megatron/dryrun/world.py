"""One process that pretends to be one rank of a large job.

torch's fake process group answers every collective at once, so that Megatron's own
`initialize_model_parallel` makes its real groups at the real world size; modules are built on the meta
device, which has shapes and no memory.
"""

import contextlib
import copy
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

from omegaconf import DictConfig

from dsv3_megatron import dispatch, dualpipe
from dsv3_megatron.conf import ConfigError
from dsv3_megatron.conf.argv import to_megatron_argv
from dsv3_megatron.conf.check import data_parallel_size, world_size
from dsv3_megatron.conf.serving import is_for_serving, serving_of
from dsv3_megatron.cpu import CPU_FLAGS
from dsv3_megatron.dualpipe.ranks import Placement
from dsv3_megatron.errors import told
from dsv3_megatron.specs.deployment import Deployment, deploy


class FakeWorld:
    """One rank of a job; a context manager that makes and destroys the fake groups.

    Attributes:
        args: Megatron's validated arguments.
        model_config: the `DSV3ModelConfig` the trainer would build from.
        groups: Megatron's `ProcessGroupCollection` of this rank.
        placement: where `--pipeline-schedule` puts the stages, None for Megatron's own placement.
        deployment: of a layout for serving.

    The modules are those of the reference backend (`--transformer-impl local`), whose parameters have the
    shapes of Transformer Engine's and which needs nothing installed; with `own_modules` those that the words name.
    """

    def __init__(
        self, words: list[str], rank: int, world_size: int, ranks_per_node: int, own_modules: bool = False
    ) -> None:
        """words: arguments of `dsv3_megatron.train`, without `--device`; own_modules: the backend that they name."""
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}: the job has {world_size} ranks, 0 to {world_size - 1}")
        self.rank, self.world_size, self.ranks_per_node = rank, world_size, ranks_per_node
        self.words = list(words) if own_modules else with_modules_everywhere(words)
        self.args: Namespace
        self.model_config: Any
        self.groups: Any
        self.placement: Placement | None = None
        self.deployment = Deployment()
        self.num_experts: int | None = None  # of the model, where there are slots for more

    @classmethod
    def of(cls, cfg: DictConfig, rank: int) -> "FakeWorld":
        """For a configuration from `dsv3_megatron.conf.compose`."""
        # A layout stands for the whole run: which part of a batch ramp it can run is for recipe.ranks to say.
        cfg = DictConfig({**cfg, "batch_ramp": None})
        deployment = serving_of(cfg)
        experts = cfg.get("num_experts")
        if is_for_serving(cfg):
            # Megatron holds experts against ranks, and a batch against replicas: of the first there are slots, of the
            # second nothing to say.
            # Nor is there a limit of nodes per token where each expert is asked by itself (report §3.4.2).
            cfg = DictConfig(dict(cfg))
            cfg.micro_batch_size, cfg.global_batch_size = 1, data_parallel_size(cfg)
            cfg.nvlink_domain_size = world_size(cfg)
            cfg.num_experts = deployment.num_slots(experts or 0) or None
        world = cls(to_megatron_argv(cfg), rank, world_size(cfg), cfg.cluster.gpus_per_node)
        world.deployment, world.num_experts = deployment, experts
        return world

    def __enter__(self) -> "FakeWorld":
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from torch import distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise RuntimeError(
                "a dry run needs a process of its own: torch.distributed is initialised already"
            )
        self.args = megatron_args(self.words, self.rank, self.world_size, self.ranks_per_node)
        self.model_config = model_config(self.args)
        if self.deployment.has_slots:
            self.model_config.transformer.num_moe_experts = self.num_experts
        deploy(self.model_config.transformer, self.deployment)
        self.placement = dualpipe.placement()
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world_size)
        try:
            args = self.args
            parallel_state.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
                order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
                create_gloo_process_groups=False,
            )
            self.groups = ProcessGroupCollection.use_mpu_process_groups()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        from megatron.core import parallel_state
        from torch import distributed as dist

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        dualpipe.activate("1f1b", None)

    @property
    def pipeline_rank(self) -> int:
        """Position of the rank in its pipeline, as Megatron counts (in its half of a mirrored one)."""
        return self.groups.pp.rank()

    def stages(self) -> list[int]:
        """Pipeline stages of the rank, one per model chunk."""
        if self.placement is not None:
            return list(self.placement.stages(self.placement.pipeline_rank(self.rank, self.world_size)))
        chunks = self.args.virtual_pipeline_model_parallel_size or 1
        return [self.pipeline_rank + chunk * self.groups.pp.size() for chunk in range(chunks)]

    def group_sizes(self) -> dict[str, int]:
        """Ranks in each group that this rank is a member of.

        Under DualPipe Megatron's data-parallel groups hold the ranks of the mirrored pipeline rank too: they are given
        as `mirror_dp` and `mirror_expt_dp`, and `dp` and `expt_dp` are the ranks of one pipeline rank.
        """
        groups = self.groups
        named = {
            "dp": groups.dp,
            "expt_dp": groups.expt_dp,
            "ep": groups.ep,
            "pp": groups.pp,
            "tp": groups.tp,
            "cp": groups.cp,
            "etp": groups.expt_tp,
        }
        sizes = {name: group.size() for name, group in named.items()}
        if self.placement is not None and self.placement.mirrored:
            for name in ("dp", "expt_dp"):
                sizes[f"mirror_{name}"] = sizes[name]
                sizes[name] //= 2
            sizes["pp"] = self.placement.num_ranks
        return sizes

    def build_chunks(self, pipeline_rank: int | None = None) -> list[Any]:
        """The model chunks (one, or one per virtual stage) of a pipeline rank: of this rank when None, else
        of the rank that is at `pipeline_rank` of the same pipeline and stands in the same expert group
        position.
        """
        from dsv3_megatron.specs.builder import DSV3ModelBuilder

        at = self.pipeline_rank if pipeline_rank is None else pipeline_rank
        virtual = self.args.virtual_pipeline_model_parallel_size
        with self._standing_at(at) as groups, _on_meta_device():
            builder = DSV3ModelBuilder(self.model_config)
            chunks = [
                builder.build_model(groups, vp_stage=chunk)
                for chunk in ([None] if virtual is None else range(virtual))
            ]
        if self.placement is not None:
            from dsv3_megatron.dualpipe.embedding import share_embedding

            share_embedding(chunks)
        return chunks

    @contextlib.contextmanager
    def _standing_at(self, pipeline_rank: int) -> Iterator[Any]:
        """Megatron's groups as the rank at `pipeline_rank` sees them: only its place in the pipeline
        differs.
        """
        from megatron.core import parallel_state
        from torch import distributed as dist

        own = self.groups.pp
        if pipeline_rank == own.rank():
            yield self.groups
            return
        elsewhere = dist.ProcessGroup(pipeline_rank, own.size())
        members = dist.distributed_c10d._world.pg_group_ranks
        members[elsewhere] = members[own]
        groups = copy.copy(self.groups)
        groups.pp = elsewhere
        parallel_state.set_pipeline_model_parallel_rank(pipeline_rank)
        try:
            yield groups
        finally:
            parallel_state.set_pipeline_model_parallel_rank(None)
            del members[elsewhere]


# Choices between kernels, which have no parameters, with the values that follow; the reference backend has none.
_KERNELS = {
    "--moe-grouped-gemm": 0,
    "--moe-permute-fusion": 0,
    "--cross-entropy-loss-fusion": 0,
    "--cross-entropy-fusion-impl": 1,
}


def with_modules_everywhere(words: list[str]) -> list[str]:
    """The words of the same job with modules that exist everywhere, whose parameters have the same shapes."""
    dispatcher = "--moe-token-dispatcher-type"
    plain = _without(words, _KERNELS)
    if (
        any(pair == [dispatcher, "flex"] for pair in map(list, pairwise(plain)))
        or f"{dispatcher}=flex" in plain
    ):
        # DeepEP is a module of its own; the last word wins.
        plain = [*_without(plain, {"--communication-sms": 1}), dispatcher, "alltoall"]
    return [*plain, *CPU_FLAGS]


def _without(words: list[str], options: dict[str, int]) -> list[str]:
    """The words without these options and the number of values that follows each."""
    kept: list[str] = []
    skip = 0
    for word in words:
        if skip:
            skip -= 1
            continue
        name, equals, _ = word.partition("=")
        if name in options:
            skip = 0 if equals else options[name]
        else:
            kept.append(word)
    return kept


def megatron_args(words: list[str], rank: int, world: int, ranks_per_node: int) -> Namespace:
    """What Megatron's own parsing and validation make of our argument list, on that rank."""
    from megatron.training import arguments

    from dsv3_megatron.arguments import add_arguments, complete
    from dsv3_megatron.arguments.surroundings import detect

    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
    }
    with mock.patch.dict(os.environ, env):
        words = complete(words, around=replace(detect(), files_here=False))  # they are on the cluster
    with mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", ["dryrun", *words]):
        dualpipe.install()
        dispatch.install()
        args = arguments.parse_args(extra_args_provider=add_arguments)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                arguments.validate_args(args)
            except (AssertionError, ValueError) as error:
                raise ConfigError(f"Megatron refuses the arguments: {told(error)}") from error
    return args


def model_config(args: Namespace) -> Any:
    """The `DSV3ModelConfig` of validated arguments, as the trainer makes it."""
    from megatron.training.argument_utils import gpt_config_from_args

    from dsv3_megatron.specs.builder import DSV3ModelConfig

    config = gpt_config_from_args(args, model_config_cls=DSV3ModelConfig)
    # Initial weights would be copied between pipeline stages.
    config.transformer.init_model_with_meta_device = True
    return config


@contextlib.contextmanager
def _on_meta_device() -> Iterator[None]:
    """Every new tensor is on the meta device, also where Megatron names another one."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Meta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = "meta"
            return func(*args, **kwargs)

    with torch.device("meta"), Meta():
        yield
