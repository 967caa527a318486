"""The training, validation and test datasets of a run."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from dsv3_megatron.training.batch import is_packed

# Data sets of features, see `add_source`.
_sources: list[tuple[Callable[[Any], bool], Callable[[Any, Sequence[int], bool], Any]]] = []

# Fields of GPTDatasetConfig that Megatron names otherwise on the command line.
_RENAMED = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "inter_document_masking": "dataloader_inter_document_masking",
}


def add_source(
    wanted: Callable[[Any], bool], build: Callable[[Any, Sequence[int], bool], Sequence[Any]]
) -> None:
    """Register data sets that are not Megatron's own.

    Args:
        wanted: args -> whether this run reads them; the first source that is wanted counts.
        build: (args, samples of each split, whether this rank reads) -> training, validation and test data set.
    """
    if (wanted, build) not in _sources:
        _sources.append((wanted, build))


def dataset_config(args: Any) -> GPTDatasetConfig:
    """Megatron's dataset configuration for these arguments: a field takes the argument of its name."""
    names = [field.name for field in dataclasses.fields(GPTDatasetConfig) if field.init]
    values = {
        name: getattr(args, _RENAMED.get(name, name))
        for name in names
        if hasattr(args, _RENAMED.get(name, name))
    }
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        sequences = json.loads(Path(args.per_dataset_sequences_path).read_text())
    values.update(
        tokenizer=build_tokenizer(args),
        blend=blend,
        blend_per_split=blend_per_split,
        sequences_per_dataset=sequences,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    return GPTDatasetConfig(**values)


def is_built_here(vp_stage: int | None = None) -> bool:
    """Whether this rank reads samples for that chunk: tensor-parallel rank 0 of a stage that needs any."""
    args = get_args()
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    if is_packed(args) or is_first_or_last_pipeline_stage(vp_stage):
        return True
    config = core_transformer_config_from_args(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def train_valid_test_datasets(num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
    """Build the three datasets, of at least `num_samples` samples each (train, validation, test)."""
    args = get_args()
    for wanted, build in _sources:
        if wanted(args):
            return build(args, num_samples, is_built_here(vp_stage))
    if args.mock_data:
        kind = MockGPTDataset
    else:
        kind = GPTDataset
    print_rank_0(f"> building {kind.__name__} for training, validation and test ...")
    builder = BlendedMegatronDatasetBuilder(
        kind, list(num_samples), partial(is_built_here, vp_stage=vp_stage), dataset_config(args)
    )
    return builder.build()


# Every rank calls the provider; the builder decides who reads (Megatron looks for this attribute).
train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]


def embedding_ranks(pp_ranks: Sequence[int]) -> list[int]:
    """Ranks of a pipeline group that hold a copy of the embedding: the first, and those with MTP."""
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks

    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        ranks.update(get_mtp_ranks(list(pp_ranks), core_transformer_config_from_args(get_args())))
    return sorted(ranks)
