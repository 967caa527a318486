"""A prompt's pages travel from an engine that prefilled it to one that decodes (report §3.4: two deployments).

    pages = take_pages(prefilling, prompt)     # after its first token is there
    put_pages(decoding, pages)                 # or send_pages / receive_pages between processes
    decoding.submit(prompt + first, sampling, seed)

The decoding engine finds the pages as it finds those of an earlier prompt (`prefix_caching`), so a page that is lost or
evicted is computed again and no token depends on the transport. What is in no full page, up to 65 tokens, is computed
by the decoding engine. Latents are whole on every tensor-parallel rank, so any rank of a pipeline stage may send to
any rank of the same stage.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.inference_request import compute_block_hashes_batched
from torch import Tensor

from dsv3_megatron.inference.context import PAGE_SIZE
from dsv3_megatron.inference.engine import Engine

__all__ = ["PromptPages", "put_pages", "receive_pages", "send_pages", "take_pages"]


@dataclass(frozen=True)
class PromptPages:
    """The full pages at a prompt's beginning, of one pipeline stage.

    Attributes:
        hashes: of each page's tokens and all before them, positive.
        latents: [layers of the stage (+ the drafting layer), pages, 64, kv_lora_rank + rope].
    """

    hashes: list[int]
    latents: Tensor


def take_pages(engine: Engine, prompt: list[int]) -> PromptPages:
    """A copy of the full pages that the engine has of a prompt; fewer, or none, where some were evicted.

    Raises:
        ValueError: the engine keeps no pages of prompts that are done.
    """
    known = _known(engine)
    hashes = []
    for page in compute_block_hashes_batched(torch.tensor(prompt), PAGE_SIZE):
        if page not in known:
            break
        hashes.append(page)
    return PromptPages(hashes, engine.context.memory_buffer[:, [known[page] for page in hashes]])


def put_pages(engine: Engine, pages: PromptPages) -> int:
    """Give an engine pages that it does not have yet, between two of its steps; the number that found room.

    Raises:
        ValueError: the pages are of another model, stage or dtype, or the engine keeps none.
    """
    known, buffer = _known(engine), engine.context.memory_buffer
    theirs, own = pages.latents, buffer[:, : len(pages.hashes)]
    if theirs.dtype != own.dtype or theirs.shape[0::2] != own.shape[0::2] or theirs.size(3) != own.size(3):
        raise ValueError(
            f"pages of {_kind(theirs)} do not fit a cache of {_kind(own)}: both engines must serve the same model in "
            "one dtype and the same pipeline stages, with drafts or without"
        )
    allocator = engine.context.kv_block_allocator
    held = [known[page] for page in pages.hashes if page in known]
    new = [place for place, page in enumerate(pages.hashes) if page not in known]
    allocator.block_ref_counts[held] += 1  # making room must not take those before the new ones
    blocks = allocator.allocate_memory_blocks(len(new))
    if blocks is not None and new:
        blocks = blocks.clone()  # a view of the allocator's stack
        buffer[:, blocks.long()] = theirs[:, new].to(buffer.device)
        hashes = [pages.hashes[place] for place in new]
        parents = [pages.hashes[place - 1] if place else 0 for place in new]
        allocator.register_kv_block_hashes(blocks.tolist(), hashes, parents)
        allocator.release_memory_blocks(blocks)  # nobody's, to be found
    allocator.block_ref_counts[held] -= 1
    return 0 if blocks is None else len(new)


def send_pages(pages: PromptPages, to: int, group: dist.ProcessGroup | None = None) -> None:
    """Send to a rank, which calls `receive_pages`; returns when all is under way."""
    latents = pages.latents.contiguous()
    device = latents.device
    dist.send(torch.tensor([*latents.shape, len(pages.hashes)], device=device), to, group)
    if pages.hashes:
        dist.send(torch.tensor(pages.hashes, device=device), to, group)
        dist.send(latents, to, group)


def receive_pages(engine: Engine, source: int, group: dist.ProcessGroup | None = None) -> PromptPages:
    """What a rank sends; of the dtype of this engine's cache, which must be the sender's."""
    buffer = engine.context.memory_buffer
    header = torch.empty(5, dtype=torch.int64, device=buffer.device)
    dist.recv(header, source, group)
    *shape, count = header.tolist()
    latents = buffer.new_empty(shape)
    hashes = torch.empty(count, dtype=torch.int64, device=buffer.device)
    if count:
        dist.recv(hashes, source, group)
        dist.recv(latents, source, group)
    return PromptPages(hashes.tolist(), latents)


def _known(engine: Engine) -> dict[int, int]:
    """Page of the cache by hash."""
    if not engine.settings.prefix_caching:
        raise ValueError("pages can only travel between engines with prefix_caching=True")
    return engine.context.kv_block_allocator.kv_hash_to_block_id


def _kind(pages: Tensor) -> str:
    layers, _, size, width = pages.shape
    return f"{layers} layers × {size} tokens × {width} {str(pages.dtype).removeprefix('torch.')}"
