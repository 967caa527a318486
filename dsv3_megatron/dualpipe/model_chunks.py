"""Building the chunks of a rank under a V-shaped placement."""

from typing import Any

from megatron.core.enums import ModelType
from megatron.training.models.base import compose_hooks
from megatron.training.models.dist_utils import prepare_existing_model_chunks_for_distributed_training

from dsv3_megatron.dualpipe.embedding import share_embedding


def build_chunks(
    builder: Any,
    pg_collection: Any,
    num_chunks: int = 2,
    model_type: ModelType = ModelType.encoder_or_decoder,
    **options: Any,
) -> list[Any]:
    """What `unimodal_build_distributed_models` does, for several chunks whatever the size of the pipeline group.

    Megatron builds a single chunk when the pipeline group has one rank, which DualPipe on two ranks is to it.

    Args:
        builder: a `DSV3ModelBuilder`.
        num_chunks: stages of a rank.
        options: keywords of `prepare_existing_model_chunks_for_distributed_training`.
    """
    config = builder._model_config
    chunks = [builder.build_model(pg_collection, vp_stage=vp_stage) for vp_stage in range(num_chunks)]
    share_embedding(chunks)
    for chunk in chunks:
        chunk.model_type = model_type
    chunks = compose_hooks(config.pre_wrap_hooks)(chunks)
    chunks = prepare_existing_model_chunks_for_distributed_training(
        chunks, config.transformer, pg_collection, **options
    )
    return compose_hooks(config.post_wrap_hooks)(chunks)
