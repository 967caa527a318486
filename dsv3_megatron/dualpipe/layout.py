"""Which layers each stage holds, in Megatron's layer-layout notation, folded into a V."""

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from dsv3_megatron.dualpipe.ranks import Placement


class VLayout(PipelineParallelLayerLayout):
    """Megatron's layer layout for chunks in V order: chunk 0 is stage v, chunk 1 stage 2V−1−v, chunk 2 stage 2V+v, …

    Megatron's own class numbers the second chunks down the ranks again (0…V−1, then V…2V−1 on the same ranks); in a V
    they run back up. Only what depends on that order is overridden.
    """

    def __init__(self, notation: str, placement: Placement):
        """
        Args:
            notation: stages in layer order, e.g. `"Et|tt|tt|tmL"`; one per stage of the placement.
        """
        stages = PipelineParallelLayerLayout.parse_str_to_list(notation)
        if len(stages) != placement.num_stages:
            raise ValueError(
                f"--pipeline-model-parallel-layout {notation!r} has {len(stages)} stages, but --pipeline-schedule "
                f"{placement.schedule} on --pipeline-model-parallel-size {placement.num_ranks} has "
                f"{placement.num_stages}: give that many, separated by |"
            )
        v = placement.v_size
        order = [placement.stage(chunk, rank) for chunk in range(placement.chunks) for rank in range(v)]
        super().__init__([stages[stage] for stage in order], v)
        self.placement = placement
        self.input_data = notation
        self.stages = stages
        self.flatten_layout = [layer for stage in stages for layer in stage]

    def __reduce__(self) -> tuple:
        """Pickles as its notation: checkpoints hold the arguments, and must load without this class."""
        return str, (self.input_data,)

    def __deepcopy__(self, memo: dict) -> "VLayout":
        return self

    def validate_layer_layout(self, num_layers: int, mtp_num_layers: int) -> bool:
        """Megatron's checks of the layer sequence; MTP must stand with the loss, which is where V rank 0 is."""
        flat = self.flatten_layout
        if flat.count(LayerType.decoder) != num_layers or flat.count(LayerType.mtp) != (mtp_num_layers or 0):
            raise ValueError(
                f"--pipeline-model-parallel-layout {self.input_data!r} has {flat.count(LayerType.decoder)} decoder "
                f"and {flat.count(LayerType.mtp)} MTP layers, the model has --num-layers {num_layers} and "
                f"--mtp-num-layers {mtp_num_layers or 0}"
            )
        ends = flat[0] is LayerType.embedding and flat[-1] is LayerType.loss
        if not ends or flat.count(LayerType.embedding) != 1 or flat.count(LayerType.loss) != 1:
            raise ValueError(
                f"--pipeline-model-parallel-layout {self.input_data!r} must begin with the embedding (E) and end "
                "with the loss (L), each once"
            )
        last = self.stages[-1]
        if (
            last.count(LayerType.mtp) != flat.count(LayerType.mtp)
            or LayerType.decoder in last[_first_mtp(last) :]
        ):
            raise ValueError(
                f"--pipeline-model-parallel-layout {self.input_data!r}: MTP layers (m) must stand directly before "
                "the loss (L) in the last stage, where embedding and head are shared with the main model"
            )
        return False  # not "MTP standalone": it shares its stage with the loss

    def _stage(self, vp_stage: int | None, pp_rank: int | None) -> int:
        from megatron.core import parallel_state

        v = parallel_state.get_pipeline_model_parallel_rank() if pp_rank is None else pp_rank
        return self.placement.stage(vp_stage or 0, v)

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        return self.stages[self._stage(vp_stage, pp_rank)].count(layer_type)

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        return sum(stage.count(layer_type) for stage in self.stages[: self._stage(vp_stage, pp_rank)])


def _first_mtp(stage: list[LayerType]) -> int:
    return stage.index(LayerType.mtp) if LayerType.mtp in stage else len(stage)
