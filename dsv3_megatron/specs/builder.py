"""The model builder of `--spec dsv3`: our specs, initial weights by name, who has embedding and head."""

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import utils as pipeline  # is_pp_last_stage may be patched (DualPipe)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder

from dsv3_megatron.specs.init import initialize
from dsv3_megatron.specs.model_config import DSV3ModelConfig
from dsv3_megatron.training import hooks

__all__ = ["DSV3ModelBuilder", "DSV3ModelConfig"]


class DSV3ModelBuilder(GPTModelBuilder):
    """Builds GPTModel chunks from `dsv3` and fills them by global name.

    Decoder and MTP both come from our specs (through the patch `mtp_block_spec`, which importing them
    installs). Under `--pipeline-schedule` the chunks of a rank are those of its V (patch
    `build_distributed_models`).
    """

    def is_first_stage(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> bool:
        """Does this chunk hold the embedding?"""
        vp_size = self._model_config.virtual_pipeline_model_parallel_size
        return pipeline.is_vp_first_stage(vp_stage, vp_size) and pipeline.is_pp_first_stage(pg_collection.pp)

    def is_last_stage(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> bool:
        """Does this chunk hold head and loss?"""
        vp_size = self._model_config.virtual_pipeline_model_parallel_size
        return pipeline.is_vp_last_stage(vp_stage, vp_size) and pipeline.is_pp_last_stage(pg_collection.pp)

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one chunk of the model.

        Args:
            pg_collection: process groups.
            pre_process, post_process: whether the chunk has embedding and head; `is_first_stage` and
                `is_last_stage` decide, whatever the caller says, since Megatron's callers know only its own
                placement.
            vp_stage: index of the chunk on this rank, None without virtual pipelining.
        """
        config = self._model_config.transformer
        hooks.building(config, pg_collection)
        perform_initialization = config.perform_initialization
        config.perform_initialization = False  # Megatron's own draws would be overwritten
        try:
            model = super().build_model(
                pg_collection,
                pre_process=self.is_first_stage(pg_collection, vp_stage),
                post_process=self.is_last_stage(pg_collection, vp_stage),
                vp_stage=vp_stage,
            )
        finally:
            config.perform_initialization = perform_initialization
        if perform_initialization:
            initialize(model, self._model_config.seed)
        return model
