"""What a schedule asks of a job before its table is built, so that nobody has to ask for its name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """Properties of all tables of one name.

    Attributes:
        chunks: stages that a rank holds; the default where `chunks_choice` says that there are others.
        directions: streams of microbatches; two: each stage is on two ranks, mirrors of each other.
        folded: a rank's stages lie in a V, or in several, so that the last stage is on the rank of the first.
        delays_weight_gradients: weight gradients run apart from the input gradients.
        least_microbatches: for each rank, over all directions together.
        chunks_choice: other numbers of chunks that may be chosen.
    """

    chunks: int = 1
    directions: int = 1
    folded: bool = False
    delays_weight_gradients: bool = True
    least_microbatches: int = 0
    chunks_choice: tuple[int, ...] = ()

    def num_stages(self, num_ranks: int, chunks: int | None = None) -> int:
        """Of the whole model; a rank's stages of two directions are also those of its mirror."""
        held = chunks if chunks and self.chunks_choice else self.chunks
        return num_ranks * held // self.directions


# Of the names that `--pipeline-schedule` takes.
TRAITS = {
    "1f1b": Traits(delays_weight_gradients=False),
    "zb1p": Traits(),
    "dualpipe": Traits(chunks=2, directions=2, folded=True, least_microbatches=2),
    "dualpipev": Traits(chunks=2, folded=True, least_microbatches=2),
    "zigzag": Traits(chunks=2, folded=True, chunks_choice=(2, 4)),
}
