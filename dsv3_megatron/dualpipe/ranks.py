"""Which rank of the job does what under a bidirectional placement: pure arithmetic.

A job of W ranks and P pipeline ranks has Q = W / P ranks beside each other on every pipeline rank. Global rank g is
on pipeline rank g // Q, at column g % Q, as Megatron counts. Under DualPipe pipeline ranks k and P−1−k hold the same
two stages, min(k, P−1−k) and max(k, P−1−k) (report §3.2.1), so for Megatron's groups they are replicas of one "V" of
P/2 pipeline ranks: Megatron is told of P/2 pipeline ranks and twice the data-parallel size, and every group, sampler,
optimizer shard and checkpoint replica follows from that. DualPipeV is the V alone: P ranks, 2P stages, no replica.
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

    def global_rank(self, megatron_rank: int, world_size: int) -> int:
        """The job's rank for a rank as Megatron numbers them with `v_size` pipeline ranks.

        Megatron's V rank v has 2Q columns: the first Q are the replica on pipeline rank v, the others the one on
        P−1−v, so that columns keep their order and expert-parallel groups stay on neighbouring ranks.
        """
        if not self.mirrored:
            return megatron_rank
        columns = world_size // self.num_ranks
        v, column = divmod(megatron_rank, 2 * columns)
        if column < columns:
            return v * columns + column
        return (self.num_ranks - 1 - v) * columns + column - columns

    def pipeline_rank(self, global_rank: int, world_size: int) -> int:
        """Pipeline rank of a rank of the job."""
        return global_rank // (world_size // self.num_ranks)

    def pipeline_ranks(self, global_rank: int, world_size: int) -> list[int]:
        """Global ranks of the pipeline that `global_rank` belongs to, in the order of pipeline ranks."""
        columns = world_size // self.num_ranks
        return [k * columns + global_rank % columns for k in range(self.num_ranks)]
