"""Which rank of the job does what under a bidirectional placement: pure arithmetic.

A job of W ranks and P pipeline ranks has Q = W / P ranks beside each other on every pipeline rank, its columns. Under
DualPipe pipeline ranks k and P−1−k hold the same two stages, min(k, P−1−k) and max(k, P−1−k) (report §3.2.1), so for
Megatron's groups they are replicas of one "V" of P/2 pipeline ranks: Megatron is told of P/2 pipeline ranks and twice
the data-parallel size, and every group, sampler, optimizer shard and checkpoint replica follows from that. In
Megatron's numbering a rank and its mirror then lie in neighbouring blocks of Q ranks: pipeline ranks 0, P−1, 1, P−2, …
So every group holds ascending ranks, the only order that `torch.distributed.new_group` of torch 2.11 knows.

DualPipeV is the V alone: P ranks, 2P stages, no replica.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """A V-shaped placement of stages on pipeline ranks.

    Attributes:
        schedule: "dualpipe" or "dualpipev".
        num_ranks: pipeline ranks of the job, P.
    """

    schedule: str
    num_ranks: int

    @property
    def mirrored(self) -> bool:
        """Whether each stage is held by two pipeline ranks."""
        return self.schedule == "dualpipe"

    @property
    def num_stages(self) -> int:
        return self.num_ranks if self.mirrored else 2 * self.num_ranks

    @property
    def v_size(self) -> int:
        """Pipeline ranks of one V, which is what Megatron's pipeline group holds."""
        return self.num_stages // 2

    def v_rank(self, pipeline_rank: int) -> int:
        """Rank in its V: 0 holds the first and the last stage."""
        return min(pipeline_rank, self.num_stages - 1 - pipeline_rank)

    def stages(self, pipeline_rank: int) -> tuple[int, int]:
        """The two stages of a pipeline rank, lower first: the order of Megatron's model chunks on every rank."""
        v = self.v_rank(pipeline_rank)
        return v, self.num_stages - 1 - v

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
