"""What both models compute on the same tokens, in fp32 on the CPU: logits, MTP's logits, the routers' choices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.convert import logits as models
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.to_hf import MegatronWeights
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.fp8.precision import factory_of

__all__ = ["Forward", "named", "of_megatron", "of_transformers", "prompt_tokens", "too_large"]


@dataclass
class Forward:
    """Of one prompt of s tokens.

    Attributes:
        logits: fp32 [s, vocabulary].
        mtp_logits: of the first MTP depth, for positions 0 to s − 2, fp32 [s − 1, vocabulary]; None without one.
        experts: by released layer name, int64 [tokens, K].
        margins: by layer, how far the last chosen expert's score is above the best one that was not chosen in the
            groups that were kept, fp32 [tokens] (of the specs' router only).
    """

    logits: Tensor
    mtp_logits: Tensor | None = None
    experts: dict[str, Tensor] = field(default_factory=dict)
    margins: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def named(option: str) -> Iterator[None]:
    """Let what is said of a folder begin with the option that gave it."""
    try:
        yield
    except ConversionError as error:
        raise RefusedArgument(f"{option} {error}") from error


def too_large(hf: HFDirectory) -> str:
    """Why two models in fp32 cannot be computed in this machine's free memory; "" where they can."""
    needed, free = 2 * 4 * sum(hf.entry(name).numel for name in hf.weights), models.free_memory()
    return (
        f"two fp32 models need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > free else ""
    )


def prompt_tokens(hf: HFDirectory, prompts: Sequence[str] | None) -> list[Tensor]:
    """Ids of each prompt, int64 [1, s], by the directory's tokenizer; prompts of ours cut to the model's context.

    Raises:
        RefusedArgument: a prompt has no ids, ids that the model has not, or more than its context.
    """
    arch, texts = hf.architecture, prompts or models.PROMPTS
    found = models.prompt_tokens(hf.folder, arch.vocab_size, texts)
    if not prompts:
        found = [ids[:, : arch.max_position_embeddings] for ids in found]
    for text, ids in zip(texts, found, strict=True):
        wrong = ""
        if not ids.numel():
            wrong = "it has no tokens"
        elif int(ids.max()) >= arch.vocab_size:
            wrong = (
                f"the tokenizer makes {int(ids.max())} of it, and the model's vocabulary is {arch.vocab_size}"
            )
        elif ids.numel() > arch.max_position_embeddings:
            wrong = f"it has {ids.numel()} tokens, and the model's context is {arch.max_position_embeddings}"
        if wrong:
            raise RefusedArgument(f"--prompt {text[:40]!r}: {wrong}")
    return found


@torch.no_grad()
def of_transformers(
    hf: HFDirectory,
    tokens: Sequence[Tensor],
    dtype: Callable[[str], torch.dtype] = lambda name: torch.float32,
) -> list[Forward]:
    """transformers' model with the directory's weights; its MTP layer is put together from transformers' own layer.

    Args:
        tokens: int64 [1, s] of each prompt.
        dtype: by released name, what a weight is rounded to before it is computed with in fp32: that of a checkpoint
            whose weights were converted so.
    """

    def read(name: str) -> Tensor:
        return hf.tensor(name, dtype(hf.copies.get(name, name))).float()

    layers = hf.architecture.num_layers
    extra = f"model.layers.{layers}."
    weights = {name: read(name) for name in hf.weights if not name.startswith("model.layers.")}
    main = dict(weights)
    main |= {
        name: read(name)
        for name in hf.weights
        if name.startswith("model.layers.") and int(name.split(".")[2]) < layers
    }
    model = models.transformers_model(hf.config, main, hf.folder)
    found, hidden = [], []
    for ids in tokens:
        with _routers_of_transformers(model) as experts:
            output = model(ids, output_hidden_states=True)
        found.append(Forward(output.logits[0].clone(), experts=dict(experts)))
        hidden.append(output.hidden_states[-1])  # after the last norm
    del model, main
    if not hf.architecture.mtp_num_layers:
        return found
    # MTP (report §2.2) as a model of one layer, whose input is the projection of the two norms.
    inner = {name: read(name) for name in hf.weights if name.startswith(extra)}
    projection, enorm, hnorm = (inner.pop(f"{extra}{name}.weight") for name in ("eh_proj", "enorm", "hnorm"))
    inner["model.norm.weight"] = inner.pop(f"{extra}shared_head.norm.weight")
    inner = {name.replace(extra, "model.layers.0."): value for name, value in inner.items()}
    for kept in ("model.embed_tokens.weight", "lm_head.weight"):
        copy = next(
            (copy for copy, original in hf.copies.items() if original == kept and copy.startswith(extra)),
            kept,
        )
        inner[kept] = read(copy)
    dense = not hf.architecture.is_moe(layers)
    settings = {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1 if dense else 0,
        "num_nextn_predict_layers": 0,
    }
    depth = models.transformers_model({**hf.config, **settings}, inner, hf.folder)
    epsilon = hf.architecture.layernorm_epsilon
    for ids, main_hidden, one in zip(tokens, hidden, found, strict=True):
        if ids.shape[1] < 2:
            continue
        embedded = inner["model.embed_tokens.weight"][ids[:, 1:]]
        both = torch.cat([_rms(embedded, enorm, epsilon), _rms(main_hidden[:, :-1], hnorm, epsilon)], -1)
        with _routers_of_transformers(depth) as experts:
            one.mtp_logits = depth(inputs_embeds=both @ projection.T).logits[0].clone()
        one.experts |= {
            name.replace("layers.0", f"layers.{layers}"): choice for name, choice in experts.items()
        }
    return found


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight


@contextmanager
def _routers_of_transformers(model: Any) -> Iterator[dict[str, Tensor]]:
    """Choices of the gates in what runs inside, by layer."""
    experts: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):

            def keep(_: Any, given: Any, output: Any, layer: str = name.removesuffix(".mlp.gate")) -> None:
                experts[layer] = output[-1].reshape(-1, output[-1].shape[-1]).clone()

            hooks.append(module.register_forward_hook(keep))
    try:
        yield experts
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def of_megatron(megatron: MegatronWeights, tokens: Sequence[Tensor], fp8: str = "") -> list[Forward]:
    """The specs' model with the checkpoint's weights, MTP as the trainer computes it.

    Args:
        tokens: int64 [1, s] of each prompt.
        fp8: a recipe of ours whose FP8 products are computed, as in training; "" for fp32 throughout.
    """
    more = {"fp8_quantizer_factory": factory_of(fp8)} if fp8 else {}
    found = []
    layers = megatron.architecture.num_layers
    with models.megatron_model(megatron.architecture, megatron.checkpoint.path, **more) as model:
        for ids in tokens:
            position = torch.arange(ids.shape[1])[None]
            one = Forward(model(ids, position, attention_mask=None)[0].clone())
            seen: list[Tensor] = []
            hooks = _hooks_of_megatron(model, layers, one)
            # Cloned: the cross entropy works in place.
            hooks.append(
                model.output_layer.register_forward_hook(
                    lambda m, given, output, to=seen: to.append(output[0].clone())
                )
            )
            try:
                model(ids, position, attention_mask=None, labels=ids.roll(-1, 1))
            finally:
                for hook in hooks:
                    hook.remove()
            if megatron.architecture.mtp_num_layers and ids.shape[1] > 1:
                one.mtp_logits = seen[0][:-1, 0]  # the first call is the first depth's
                last = f"model.layers.{layers}"
                if last in one.experts:  # the last place has no next token in transformers' form
                    one.experts[last] = one.experts[last][:-1]
                    one.margins[last] = one.margins[last][:-1]
            found.append(one)
    return found


def _hooks_of_megatron(model: Any, layers: int, one: Forward) -> list[Any]:
    from dsv3_megatron.specs.names import global_names
    from dsv3_megatron.specs.router import DSV3Router

    names = global_names(model)
    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, DSV3Router):
            continue
        block, _, number, *_ = names[f"{name}.weight"].name.split(".")
        layer = f"model.layers.{int(number) + (layers if block == 'mtp' else 0)}"

        def keep(router: Any, given: Any, output: Any, layer: str = layer) -> None:
            chosen = output[1].reshape(-1, output[1].shape[-1]).bool()
            one.experts[layer] = chosen.nonzero()[:, 1].view(len(chosen), -1)
            scores = router.gating(given[0]).reshape(chosen.shape).float()
            scores = (
                scores.sigmoid()
                if router.config.moe_router_score_function == "sigmoid"
                else scores.softmax(-1)
            )
            if router.expert_bias is not None:
                scores = scores + router.expert_bias
            last = scores.masked_fill(~chosen, torch.inf).amin(-1)
            near = (scores.masked_fill(chosen, torch.inf) - last[:, None]).abs().amin(-1)
            one.margins[layer] = near

        hooks.append(module.register_forward_hook(keep))
    return hooks
