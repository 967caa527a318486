"""The model of a source on this rank: device, groups, modules, weights."""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.to_hf import MegatronWeights
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.serve.source import Source
from dsv3_megatron.specs.deployment import PLAIN, Deployment, deploy

__all__ = ["DTYPES", "Layout", "loaded_model", "use_device"]

DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; what is left of the world is data parallel.

    Attributes:
        deployment: copies of experts, whole MLPs, overlapped microbatches (report §3.4).
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    deployment: Deployment = PLAIN

    def check(self, arch: Architecture, world_size: int) -> None:
        """Raise `RefusedArgument` where the model or the world cannot be cut so."""
        experts = 0 if arch.num_dense_layers == arch.num_layers else arch.num_experts
        try:
            self.deployment.check(experts, arch.num_shared_experts if experts else 0, self.expert)
        except ValueError as error:
            given = f"--redundant-experts {self.deployment.extra_slots}"
            raise RefusedArgument(f"{given} --expert-model-parallel-size {self.expert}: {error}") from error
        experts = self.deployment.num_slots(experts) if experts else 0
        for option, size, what, whole in (
            ("--tensor-model-parallel-size", self.tensor, "attention heads", arch.num_attention_heads),
            ("--tensor-model-parallel-size", self.tensor, "entries of the vocabulary", arch.vocab_size),
            ("--expert-model-parallel-size", self.expert, "experts", experts),
            ("--tensor-model-parallel-size × --pipeline-model-parallel-size", self.tensor * self.pipeline,
             "processes (torchrun --nproc-per-node)", world_size),
            ("--expert-model-parallel-size × --pipeline-model-parallel-size", self.expert * self.pipeline,
             "processes (torchrun --nproc-per-node)", world_size),
        ):  # fmt: skip
            if size < 1 or whole % size or (size > 1 and not whole):
                raise RefusedArgument(f"{option} {size}: does not divide the {whole} {what}")
        if self.pipeline > arch.num_layers:
            raise RefusedArgument(
                f"--pipeline-model-parallel-size {self.pipeline}: more than the model's {arch.num_layers} layers"
            )

    def stages(self, arch: Architecture) -> list[list[str]] | None:
        """Layers of each pipeline stage for Megatron, as even as possible; None for a single stage."""
        if self.pipeline == 1:
            return None
        base, more = divmod(arch.num_layers, self.pipeline)
        # The last stage has the head and the MTP layer besides.
        stages = [["decoder"] * (base + (number < more)) for number in range(self.pipeline)]
        stages[0].insert(0, "embedding")
        stages[-1] += ["mtp"] * arch.mtp_num_layers + ["loss"]
        return stages


def use_device(device: str) -> None:
    """Make this process one of the CPU runtime, or see that there is a GPU. Before Megatron is imported.

    Raises:
        RefusedArgument: there is no GPU.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU
    _quiet()
    import torch

    from dsv3_megatron import cpu

    if device == "cuda":
        if cpu.is_active() or not torch.cuda.is_available():
            raise RefusedArgument("--device cuda (the default): no GPU is visible. Use --device cpu.")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a decode step is many small products: threads wait for each other
    cpu.activate()


def _quiet() -> None:
    """Without what Megatron says of its lacks for training, and torch of its own future."""
    for module in ("megatron", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.ERROR)


@contextmanager
def loaded_model(source: Source, layout: Layout, dtype: str, transformer_impl: str) -> Iterator[Any]:
    """This rank's part of the model, in evaluation mode; its process groups live as long.

    Args:
        dtype: one of `DTYPES`, of weights and cache.
        transformer_impl: "local" (plain PyTorch) or "transformer_engine".

    Raises:
        RefusedArgument: the layout is not possible.
    """
    layout.check(source.architecture, int(os.environ.get("WORLD_SIZE", "1")))
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from dsv3_megatron.backends.linear import lay_out_for_inference

    if "RANK" in os.environ:
        dist.init_process_group("nccl")  # gloo, where the CPU runtime is active
    else:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
        )
        model_parallel_cuda_manual_seed(1)
        model = _build(source.architecture, layout, dtype, transformer_impl)
        _fill(model, source, layout.deployment)
        lay_out_for_inference(model.eval())
        yield model
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build(arch: Architecture, layout: Layout, dtype: str, transformer_impl: str) -> Any:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsv3_megatron.convert.logits import check_kept, transformer_fields
    from dsv3_megatron.specs.builder import DSV3ModelBuilder, DSV3ModelConfig

    params_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    fields = transformer_fields(arch) | {
        "params_dtype": params_dtype,
        "bf16": dtype == "bf16",
        "transformer_impl": transformer_impl,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "pipeline_model_parallel_size": layout.pipeline,
        "pipeline_dtype": params_dtype,
        "pipeline_model_parallel_layout": layout.stages(arch),
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
    }
    # Megatron holds experts against ranks, and with copies it is the slots that must divide (`Layout.check`).
    ranks = 1 if layout.deployment.has_slots else layout.expert
    transformer = MLATransformerConfig(**fields | {"expert_model_parallel_size": ranks})
    transformer.expert_model_parallel_size = layout.expert
    deploy(transformer, layout.deployment)
    config = DSV3ModelConfig(
        transformer=transformer,
        vocab_size=arch.vocab_size,
        seq_length=arch.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
    )
    layout_key = "pipeline_model_parallel_layout"  # Megatron makes an object of it
    check_kept({name: value for name, value in fields.items() if name != layout_key}, config.transformer)
    return DSV3ModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def _fill(model: Any, source: Source, deployment: Deployment = PLAIN) -> None:
    if source.hf is not None:
        _fill_by_name(model, source, source.hf)
        return
    if deployment.has_slots or deployment.whole_mlps:
        # Megatron's own loading knows experts and shards of training only.
        _fill_by_name(model, source, MegatronWeights(source.folder))
        return
    from megatron.core import dist_checkpointing

    wanted = {"model": model.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
    loaded = dist_checkpointing.load(wanted, str(source.checkpoint))["model"]
    model.load_state_dict(loaded)


def _fill_by_name(model: Any, source: Source, weights: HFDirectory | MegatronWeights) -> None:
    """Read what this rank has of each tensor, one after the other."""
    import torch

    from dsv3_megatron.convert.hf_names import to_hf
    from dsv3_megatron.specs.names import global_names, named_weights

    names = global_names(model)
    with torch.no_grad():
        for local, weight in named_weights(model).items():
            name, shard = names[local].name, names[local].shard
            parts = to_hf(name, source.architecture.num_layers)
            if isinstance(weights, HFDirectory):
                full = torch.cat([weights.tensor(part, weight.dtype) for part in parts])
                for part in parts:
                    weights.forget(part)
            else:
                full = torch.cat([weights.tensor(part) for part in parts])
            weight.copy_(shard.take(full))


def default_cache_bytes(
    arch: Architecture, layout: Layout, dtype: str, batch: int, length: int, draft: bool
) -> int:
    """Cache of one rank that `batch` requests of `length` tokens can fill, or what the device has to spare."""
    from dsv3_megatron import cpu

    layers = math.ceil(arch.num_layers / layout.pipeline) + int(draft)
    per_token = layers * (arch.kv_lora_rank + arch.qk_pos_emb_head_dim) * (2 if dtype == "bf16" else 4)
    pages = batch * (math.ceil(length / 64) + 1) + 2
    wanted = pages * 64 * per_token
    spare = int(free_bytes() * (0.5 if cpu.is_active() else 0.8))
    least = (math.ceil(length / 64) + 3) * 64 * per_token
    if spare < least:
        raise RefusedArgument(
            f"--max-length {length}: one request takes {least / 2**30:.2f} GiB of cache, {spare / 2**30:.2f} are free; "
            "use a smaller one"
        )
    return min(wanted, spare)


def free_bytes() -> int:
    """This rank's share of what the machine's memory has free, or of its device."""
    import torch

    from dsv3_megatron import cpu

    if not cpu.is_active():
        return torch.cuda.mem_get_info()[0]
    from dsv3_megatron.convert.logits import free_memory

    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
