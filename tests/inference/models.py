"""Small models in Hugging Face directories, engines over them, and transformers' answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_megatron.inference import Engine, EngineSettings
from dsv3_megatron.serve.load import Layout, _build, _fill, loaded_model
from dsv3_megatron.serve.source import open_source
from tests.convert.releases import YARN, micro, release

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {},
    "query uncompressed": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "two shared experts, no groups": {
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "dense": {"first_k_dense_replace": 3},
}
PAD = 0


def write_model(folder: Path, mtp: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """A model of three layers with random weights; `mtp` adds a layer that drafts."""
    release(folder, micro(**overrides), mtp=mtp, seed=seed)
    return folder


@contextmanager
def opened(folder: Path, layout: Layout | None = None) -> Iterator[Any]:
    """This rank's part of the model; its groups live as long."""
    with loaded_model(open_source(None, folder), layout or Layout(), "fp32", "local") as model:
        yield model


def another(folder: Path, dtype: str = "fp32") -> Any:
    """A further model in this process, in the groups of the first."""
    source = open_source(None, folder)
    model = _build(source.architecture, Layout(), dtype, "local")
    _fill(model, source)
    return model.eval()


def engine(model: Any, **settings: Any) -> Engine:
    return Engine(model, EngineSettings(**{"max_length": 128, "max_batch": 8, **settings}))


def prompts(*lengths: int, vocab_size: int = 96, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def full_logits(model: Any, tokens: list[int]) -> Tensor:
    """The trainer's forward pass, no cache: [tokens, vocabulary]."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(ids, torch.arange(len(tokens))[None], attention_mask=None)[0]


def full_log_probs(model: Any, tokens: list[int]) -> Tensor:
    """log p of every token but the first, by the trainer's forward pass: [tokens − 1]."""
    table = full_logits(model, tokens)[:-1].log_softmax(-1)
    return table.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


def transformers_greedy(folder: Path, batch: list[list[int]], count: int) -> tuple[list[list[int]], Tensor]:
    """transformers' greedy tokens with its cache, and the logits of each step: [count, prompts, vocabulary]."""
    config = DeepseekV3Config.from_pretrained(folder)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    longest = max(map(len, batch))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
    model.generation_config.eos_token_id = None  # all tokens count, none is an end
    result = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[:, longest:].tolist(), torch.stack(result.logits)


@contextmanager
def recorded_logits(engine: Engine) -> Iterator[dict[int, list[Tensor]]]:
    """Logits that the engine sampled from, by request, one row per generated token (without drafts)."""
    rows: dict[int, list[Tensor]] = {}
    controller, context = engine.engine.controller, engine.context
    sample = controller._dynamic_step_sample_logits

    def record() -> None:
        requests = context.request_ids[context.active_slice].tolist()
        for request, row in zip(requests, controller._all_logits_cuda.squeeze(0), strict=False):
            rows.setdefault(request, []).append(row.clone())
        sample()

    controller._dynamic_step_sample_logits = record
    try:
        yield rows
    finally:
        controller._dynamic_step_sample_logits = sample
