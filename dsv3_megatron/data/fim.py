"""Fill-in-the-middle at document level, in prefix-suffix-middle (PSM) order (report §4.1).

    <|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>middle<|eos_token|>

Why Megatron's `GPTFIMDataset` does not serve (megatron/training/datasets/fim_dataset.py, core 0.19):

- it permutes *after* packing: `_query_document_sample_shuffle_indices` cuts the packed sample at its EOD
  tokens, so a document that crosses a sample boundary is permuted piece by piece, whereas DeepSeek permutes
  whole documents;
- to keep the sample's length it then drops the tokens that the sentinels pushed out, or pads, so text is
  lost;
- its random state advances with every access, so what a sample looks like depends on the loader's worker and
  on where the run was resumed;
- it decodes token ids to text and encodes again, so a sample that begins inside a multi-byte character is
  damaged.

Here the choice and the two cuts depend only on the document's id and a seed, and are made on the document's
characters before it is tokenized, so no token straddles a cut. They are made once, in preparation: a document
has the same form in each epoch. Where the cuts fall is unpublished: they are uniform over the len(text) + 1
character boundaries, as in Bavarian et al., "Efficient Training of Language Models to Fill in the Middle"
(2022).
"""

import random
from collections.abc import Callable

from dsv3_megatron.data.vocabulary import EOS, FIM_BEGIN, FIM_END, FIM_HOLE


def fim_cuts(text: str, document_id: bytes, rate: float, seed: int) -> tuple[int, int] | None:
    """The two cuts `0 <= a <= b <= len(text)` of a document chosen for FIM, or None for one that stays as it
    is.

    Deterministic in (document_id, seed). The middle is `text[a:b]`; each part may be empty. A document is
    chosen with probability `rate`.
    """
    rng = random.Random(document_id + seed.to_bytes(8, "little"))
    if rng.random() >= rate:
        return None
    a, b = sorted(rng.randint(0, len(text)) for _ in range(2))
    return a, b


def document_tokens(
    text: str,
    cuts: tuple[int, int] | None,
    encode: Callable[[str], list[int]],
    special_ids: dict[str, int],
) -> list[int]:
    """Token ids of one document: plain (`text<|eos_token|>`) if `cuts` is None, else the PSM form shown
    above.

    `encode` maps text to ids without adding or recognising special tokens; `special_ids` maps their names to
    ids.
    """
    if cuts is None:
        return [*encode(text), special_ids[EOS]]
    a, b = cuts
    return [
        special_ids[FIM_BEGIN],
        *encode(text[:a]),
        special_ids[FIM_HOLE],
        *encode(text[b:]),
        special_ids[FIM_END],
        *encode(text[a:b]),
        special_ids[EOS],
    ]
