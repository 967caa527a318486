"""The average in Megatron's distributed checkpoints: under `ema.‹name of the weight›`, sharded as the weight is.

So it loads into any layout and schedule, like the weights themselves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIX = "ema"


def named_parameters(model: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """The parameters of all chunks of this rank by chunk and name."""
    return {f"{i}.{name}": p for i, chunk in enumerate(model) for name, p in chunk.named_parameters()}


def sharded(
    model_state: Mapping[str, Any], parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Any:
    """The state to save or load: `values` with the sharding that `model_state` has for `parameters`."""
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
    )

    names = list(parameters)
    by_index = get_param_id_to_sharded_param_map(dict(model_state), parameters.values())
    missing = [name for i, name in enumerate(names) if i not in by_index]
    # Copies that the checkpoint does not hold, such as MTP's of the embedding, share the original's sharded tensor.
    if missing:
        raise RuntimeError(f"--ema-decay: the checkpoint has no place for {', '.join(missing)}")
    return {
        name: make_sharded_optimizer_tensor(by_index[i], values[name], PREFIX) for i, name in enumerate(names)
    }


def is_in(checkpoint: Path) -> bool:
    """Whether a checkpoint holds an average."""
    from megatron.core import dist_checkpointing

    names = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return any(name.startswith(PREFIX + ".") for name in names)


@torch.no_grad()
def load(checkpoint: Path, model: Sequence[Any], values: Mapping[str, Tensor]) -> None:
    """Fill `values`, named as `named_parameters(model)`, from a checkpoint of any layout."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.utils import unwrap_model

    metadata = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    chunks = unwrap_model(list(model))  # checkpoints have the names of the bare model
    state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    wanted = {PREFIX: sharded(state, named_parameters(model), values)}
    for name, value in dist_checkpointing.load(wanted, str(checkpoint))[PREFIX].items():
        if value is not values[name]:
            values[name].copy_(value)
