"""Parameter counts from real modules: built on the meta device once per model, then read from a cache.

One dense layer, one MoE layer and the MTP layer are built with Megatron's own modules and the model's own
configuration. The cache lies in `$XDG_CACHE_HOME/dsv3_megatron` (else `~/.cache/dsv3_megatron`); its key is every
argument that shapes a module, and the versions of Megatron and of the code that builds modules.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv3_megatron.plan.parameters import ParameterCounts

# Arguments that shape no module of a layer: where layers are placed, and how they are run.
_FEW_LAYERS = {
    "num_layers": 2,
    "moe_layer_freq": [0, 1],
    "pipeline_model_parallel_size": 1,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "pipeline_schedule": None,
    "pipeline_zigzag_chunks": None,
    "pipeline_zigzag_memory_cap": None,
    "pipeline_zigzag_deferred": None,
    "pipeline_costs": None,
    "context_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "micro_batch_size": 1,
    "global_batch_size": None,
    "step_batch_size_schedule": None,
    "overlap_grad_reduce": None,
    "overlap_param_gather": None,
    "profile_pipeline": None,
}
_SHAPES = (
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "ffn_hidden_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "vocab_size",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "untie_embeddings_and_output_weights",
    "spec",
)


def count_parameters(cfg: Any, tensor_parallel_size: int) -> ParameterCounts:
    """The counts of the model that `cfg` (from `dsv3_megatron.conf.compose`) describes, from the cache if there.

    Needs `dsv3_megatron.cpu.activate()` when they are not.
    """
    path = _cache_folder() / f"parameters-{_key(cfg, tensor_parallel_size)}.json"
    try:
        return ParameterCounts(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        counts = _build(cfg, tensor_parallel_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(counts)))
        partial.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return counts


def counts_of(weights: Iterable[Any], moe_pattern: Sequence[bool], tp: int = 1) -> ParameterCounts:
    """From the `dryrun.count.Weight`s of a model with at least one layer of each kind it has."""
    layers: dict[tuple[str, int], dict[str, int]] = {}
    embedding: dict[str, int] = {}
    head: dict[str, int] = {}
    vocabulary = 0
    for weight in {weight.name: weight for weight in weights}.values():
        size = weight.local_size * weight.copies
        if weight.kind == "embedding":
            target, vocabulary = embedding, weight.full_shape[0]
        elif weight.mtp:
            target = layers.setdefault(("mtp", weight.layer or 0), {})
        elif weight.layer is None:
            target = head
        else:
            kind = "moe" if moe_pattern[weight.layer] else "dense"
            target = layers.setdefault((kind, weight.layer), {})
        target[weight.kind] = target.get(weight.kind, 0) + size
    first = {
        kind: next((c for (k, _), c in layers.items() if k == kind), {}) for kind in ("dense", "moe", "mtp")
    }
    return ParameterCounts(**first, embedding=embedding, head=head, tp=tp, padded_vocab_size=vocabulary)


def _build(cfg: Any, tp: int) -> ParameterCounts:
    """Build a few layers as one rank of a small job."""
    from omegaconf import DictConfig, OmegaConf

    from dsv3_megatron.conf.argv import to_megatron_argv
    from dsv3_megatron.dryrun import FakeWorld, weights_of

    few = DictConfig(OmegaConf.merge(cfg, _FEW_LAYERS, {"tensor_model_parallel_size": tp}))
    has_dense, has_moe = _kinds(cfg)
    if not (has_dense and has_moe):
        few.num_layers, few.moe_layer_freq = 1, [int(has_moe)]
    few.moe_layer_freq = "(" + "+".join(f"[{flag}]*1" for flag in few.moe_layer_freq) + ")"
    ep = few.get("expert_model_parallel_size") or 1
    world = math.lcm(tp, ep)
    few.sequence_parallel = True if tp > 1 else few.get("sequence_parallel")
    print("counting parameters from real modules (once per model)", file=sys.stderr, flush=True)
    with quiet(), FakeWorld(to_megatron_argv(few), 0, world, world) as fake:
        weights = [weight for chunk in fake.build_chunks() for weight in weights_of(chunk)]
    return counts_of(weights, [False, True] if has_dense and has_moe else [has_moe], tp)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the list of all arguments that Megatron prints; errors are raised, not printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _kinds(cfg: Any) -> tuple[bool, bool]:
    """Whether the model has dense and MoE layers."""
    pattern = moe_pattern(cfg)
    return not all(pattern), any(pattern)


def moe_pattern(cfg: Any) -> tuple[bool, ...]:
    """Whether each decoder layer is MoE, from `moe_layer_freq` as Megatron reads it: a number, a list, or a list
    expression such as `([0]*3+[1]*58)`."""
    if not cfg.get("num_experts"):
        return (False,) * cfg.num_layers
    given = cfg.get("moe_layer_freq", 1)
    if isinstance(given, str):
        from megatron.training.arguments import moe_freq_type

        given = moe_freq_type(given)
    if isinstance(given, int):
        return tuple(layer % given == 0 for layer in range(cfg.num_layers))
    return tuple(bool(flag) for flag in given)


def _key(cfg: Any, tp: int) -> str:
    from importlib.metadata import version

    import dsv3_megatron.specs

    code = hashlib.sha256()
    for file in sorted(Path(dsv3_megatron.specs.__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    shapes = {name: cfg.get(name) for name in _SHAPES}
    kinds = (not cfg.get("num_experts"), _kinds(cfg))
    text = json.dumps([shapes, kinds, tp, version("megatron-core"), code.hexdigest()], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_megatron"
