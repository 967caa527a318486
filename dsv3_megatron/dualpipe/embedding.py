"""One embedding for the main model and MTP, where the first and the last stage are on one rank (report §3.2.3)."""

from collections.abc import Sequence
from typing import Any

from megatron.core.utils import get_attr_wrapped_model


def share_embedding(chunks: Sequence[Any]) -> None:
    """Let the last chunk's MTP use the first chunk's embedding module, before the chunks are wrapped.

    The parameter then exists once: one gradient buffer, one optimizer shard, one entry in checkpoints. Megatron keeps
    a second copy on the MTP stage and sums the gradients, which needs a group of two ranks.
    """
    if len(chunks) < 2 or not chunks[0].pre_process or not getattr(chunks[-1], "mtp_process", False):
        return
    first, last = chunks[0], chunks[-1]
    del last.embedding
    # Past nn.Module's registration: the last chunk uses the module, the first one owns it.
    object.__setattr__(last, "embedding", first.embedding)
    last.__class__ = _without_embedding(type(last))


def shares_embedding(chunk: Any) -> bool:
    """Whether the chunk uses an embedding that another chunk owns."""
    model = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    return "embedding" in vars(model)


def _without_embedding(model_class: type) -> type:
    """The class of a chunk whose checkpoint entries leave the embedding to its owner."""

    class WithoutEmbedding(model_class):  # type: ignore[misc, valid-type]
        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            self.mtp_process = False  # Megatron would replace the entry of a copy that is not there
            try:
                return super().sharded_state_dict(*args, **kwargs)
            finally:
                self.mtp_process = True

    WithoutEmbedding.__name__ = WithoutEmbedding.__qualname__ = model_class.__name__
    return WithoutEmbedding
