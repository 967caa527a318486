"""Arguments that a step depends on and the planner has no part for: another model is refused, the rest is said."""

from argparse import Namespace
from typing import Any

from dsv3_megatron.plan.hardware import Gpu
from dsv3_megatron.plan.job import PlanError

# What the planner's model is, by the argument that would make it another one.
_ANOTHER_MODEL = {
    "experimental_attention_variant": "multi-latent attention over the whole sequence",
    "hybrid_layer_pattern": "layers of attention and MLP",
    "hybrid_override_pattern": "layers of attention and MLP",
    "moe_latent_size": "experts as wide as the hidden states",
    "cpu_offloading_num_layers": "fine_grained_activation_offloading",
}
# Weights that are gathered for use, by what Megatron makes of the argument.
_GATHERED = {
    "tensor_parallel_num_weight_shards": "gtp_weight_remat_size",
    "expert_tensor_parallel_num_weight_shards": "expert_gtp_weight_remat_size",
}
# What a step is planned with, whatever the argument says.
_PLANNED_AS = {
    "optimizer": "adam",
    "main_params_dtype": "float32",
    "num_distributed_optimizer_instances": 1,
    "tp_comm_overlap": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "window_size": None,
    "sft": False,
    "reset_attention_mask": False,
    "moe_grouped_gemm": True,
    "moe_expert_rank_capacity_factor": None,
    "mtp_use_repeated_layer": False,
    "freeze_all_layers": False,
    "fp8_wgrad": True,
    "first_last_layers_bf16": False,
    "fp32_residual_connection": False,
    "bias_swiglu_fusion": True,
    "gradient_accumulation_fusion": True,
    "use_transformer_engine_op_fuser": False,
    "disable_jit_fuser": False,
    "deterministic_mode": False,
    "empty_unused_memory_level": 0,
    "batch_invariant_mode": False,
}


def refuse_model(given: Namespace) -> None:
    """PlanError, by the argument, for a model that is not the planner's; before Megatron speaks of what it needs."""
    for name, known in _ANOTHER_MODEL.items():
        if value := getattr(given, name, None):
            raise PlanError(f"{name}={value}: the planner knows {known}; leave {name} out")


def refuse(args: Namespace, gpu: Gpu) -> None:
    """PlanError for weights that lie elsewhere, and for a precision that the GPU does not have."""
    for name, resolved in _GATHERED.items():
        if getattr(args, resolved, 1) > 1:
            raise PlanError(
                f"{name}={getattr(args, name)}: the planner knows no weights gathered for use; leave {name} out"
            )
    recipe = "nvfp4" if getattr(args, "fp4", None) else args.fp8_recipe if args.fp8 else ""
    if recipe in ("mxfp8", "nvfp4") and not gpu.fp4:
        option = "fp4_format" if recipe == "nvfp4" else "fp8_recipe=mxfp8"
        raise PlanError(
            f"{option}: {gpu.name} has no {recipe.upper()}; use fp8_recipe=blockwise, or gpu=b200"
        )


def unplanned(args: Namespace) -> tuple[str, ...]:
    """What the arguments say and a plan leaves out, in words."""
    found = []
    for name, planned in _PLANNED_AS.items():
        said = _word(getattr(args, name, planned))
        if said != planned and (name != "moe_grouped_gemm" or args.num_experts):
            found.append(f"{name}={said}, planned as {'left out' if planned is None else planned}")
    backend = getattr(args.attention_backend, "name", "auto")
    if args.pipeline_schedule != "1f1b" and backend == "unfused":
        found.append("attention_backend=unfused, planned as DeepSeek's kernels with a schedule of ours")
    if args.moe_expert_capacity_factor is not None and not args.moe_pad_expert_input_to_capacity:
        found.append(
            f"moe_expert_capacity_factor={args.moe_expert_capacity_factor:g} without "
            "moe_pad_expert_input_to_capacity, planned as none dropped"
        )
    return tuple(found)


def _word(value: Any) -> Any:
    """A data type by its name."""
    return str(value).removeprefix("torch.") if hasattr(value, "itemsize") else value
