"""Which rank of the job does what under a bidirectional placement: pure arithmetic.

A job of W ranks and P pipeline ranks has Q = W / P ranks beside each other on every pipeline rank, its columns. Under
DualPipe pipeline ranks k and P−1−k hold the same two stages, min(k, P−1−k) and max(k, P−1−k) (report §3.2.1), so for
Megatron's groups they are replicas of one "V" of P/2 pipeline ranks: Megatron is told of P/2 pipeline ranks and twice
the data-parallel size, and every group, sampler, optimizer shard and checkpoint replica follows from that. In
Megatron's numbering a rank and its mirror then lie in neighbouring blocks of Q ranks: pipeline ranks 0, P−1, 1, P−2, …
So every group holds ascending ranks, the only order that `torch.distributed.new_group` of torch 2.11 knows.

DualPipeV is the V alone: P ranks, 2P stages, no replica. A zigzag is one V after the other: with k of them P ranks hold
2kP stages, and a rank 2k of them.
"""

from dataclasses import dataclass

from dsv3_megatron.pipeline.traits import TRAITS


@dataclass(frozen=True)
class Placement:
    """A V-shaped placement of stages on pipeline ranks.

    Attributes:
        schedule: one whose stages are folded (`pipeline.traits`).
        num_ranks: pipeline ranks of the job, P.
        chunks: stages of a rank.
    """

    schedule: str
    num_ranks: int
    chunks: int = 2

    @property
    def mirrored(self) -> bool:
        """Whether each stage is held by two pipeline ranks."""
        return TRAITS[self.schedule].directions == 2

    @property
    def num_stages(self) -> int:
        return TRAITS[self.schedule].num_stages(self.num_ranks, self.chunks)

    @property
    def v_size(self) -> int:
        """Pipeline ranks of one V, which is what Megatron's pipeline group holds."""
        return self.num_ranks // 2 if self.mirrored else self.num_ranks

    def v_rank(self, pipeline_rank: int) -> int:
        """Rank in its V: 0 holds the first and the last stage."""
        return min(pipeline_rank, 2 * self.v_size - 1 - pipeline_rank)

    def stages(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, lowest first: the order of Megatron's model chunks on every rank."""
        return tuple(self.stage(chunk, self.v_rank(pipeline_rank)) for chunk in range(self.chunks))

    def stage(self, chunk: int, v_rank: int) -> int:
        """The stage of a rank's chunk: even chunks run down the ranks of a V, odd ones back up."""
        return chunk * self.v_size + (v_rank if chunk % 2 == 0 else self.v_size - 1 - v_rank)

    def mirror(self, pipeline_rank: int) -> int:
        """The pipeline rank that holds the same stages (itself when nothing is mirrored)."""
        return self.num_ranks - 1 - pipeline_rank if self.mirrored else pipeline_rank

    def block(self, pipeline_rank: int) -> int:
        """Which block of neighbouring ranks of the job a pipeline rank is."""
        if not self.mirrored:
            return pipeline_rank
        return 2 * self.v_rank(pipeline_rank) + (pipeline_rank >= self.v_size)

    def pipeline_rank(self, global_rank: int, world_size: int) -> int:
        """Pipeline rank of a rank of the job."""
        block = global_rank // (world_size // self.num_ranks)
        if not self.mirrored:
            return block
        v, is_mirror = divmod(block, 2)
        return self.mirror(v) if is_mirror else v

    def pipeline_ranks(self, global_rank: int, world_size: int) -> list[int]:
        """Global ranks of the pipeline that `global_rank` belongs to, in the order of pipeline ranks."""
        columns = world_size // self.num_ranks
        return [self.block(k) * columns + global_rank % columns for k in range(self.num_ranks)]

    def pipelines(self, world_size: int) -> list[list[int]]:
        """`pipeline_ranks` of all pipelines of the job, by column."""
        return [self.pipeline_ranks(column, world_size) for column in range(world_size // self.num_ranks)]
