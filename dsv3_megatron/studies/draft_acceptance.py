"""How often the MTP layer's draft is right when it sees the whole context, and when it sees one position alone.

    python -m dsv3_megatron.studies.draft_acceptance --run runs/demo [--prompts 24] [--new-tokens 96] [--file FILE.png]

The demo's model continues held-out text greedily. Three figures on the same continuations: what the engine accepts with
`--speculative mtp`; how often the MTP layer's first choice is the token that comes, teacher-forced over the whole
context; the same where its attention sees the last verified position alone, as in Megatron's own drafts. The picture
has them by the place in the text. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.serve.load import Layout, loaded_model, use_device
from dsv3_megatron.serve.source import open_source

__all__ = ["main"]

PROMPT = 32  # tokens of held-out text
BUCKET = 16  # tokens of a point in the picture


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a demo's run")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--file", type=Path, default=Path("drafts.png"))
    options = parser.parse_args(argv)
    for name in ("prompts", "new_tokens"):
        if getattr(options, name) < 1:
            raise RefusedArgument(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    for needed in ("checkpoints", "corpus/valid.bin"):
        if not (options.run / needed).exists():
            raise RefusedArgument(f"--run {options.run}: has no {needed}; make demo writes such a folder")
    use_device("cpu")
    found = _measure(options)
    _draw(found, options.file)
    print(options.file, file=sys.stderr)
    print(json.dumps({key: value for key, value in found.items() if key != "by_place"}))
    return 0


def _prompts(corpus: Path, count: int) -> list[list[int]]:
    """Evenly spaced beginnings out of the held-out documents."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(corpus))
    stream = np.concatenate([documents[i] for i in range(len(documents))])
    stride = (len(stream) - PROMPT) // count
    if stride < PROMPT:
        raise RefusedArgument(f"--prompts {count}: the held-out text has {len(stream)} tokens; use fewer")
    return [stream[i * stride : i * stride + PROMPT].tolist() for i in range(count)]


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    from dsv3_megatron.inference import Engine, EngineSettings, Sampling

    source = open_source(options.run / "checkpoints", None)
    if not source.architecture.mtp_num_layers:
        raise RefusedArgument(f"--run {options.run}: its model has no MTP layer")
    length = PROMPT + options.new_tokens
    if length > source.architecture.max_position_embeddings:
        longest = source.architecture.max_position_embeddings - PROMPT
        raise RefusedArgument(f"--new-tokens {options.new_tokens}: the model has room for {longest}")
    how = Sampling(max_new_tokens=options.new_tokens, temperature=0, ignore_ends=True)
    with loaded_model(source, Layout(), "fp32", "local") as model:
        prompts = _prompts(options.run / "corpus" / "valid", options.prompts)
        engine = Engine(model, EngineSettings(length, options.prompts, speculative=True))
        answers = [generation.tokens for generation in engine.generate(prompts, how)]
        accepted, per_pass = engine.statistics.acceptance, engine.statistics.tokens_per_pass
        engine.close()
        hits = [_teacher_forced(model, p + a) for p, a in zip(prompts, answers, strict=True)]
    return {
        "prompts": options.prompts,
        "new_tokens": options.new_tokens,
        "engine_acceptance": accepted,
        "tokens_per_pass": per_pass,
        **{f"teacher_forced_{name}": _mean([row[name] for row in hits]) for name in ("whole", "one")},
        "by_place": {name: _by_place([row[name] for row in hits]) for name in ("whole", "one")},
    }


def _teacher_forced(model: Any, tokens: list[int]) -> dict[str, list[bool]]:
    """Whether the MTP layer's first choice of each answer token but the first is that token."""
    import torch

    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    kept: dict[str, Any] = {}
    layer = model.mtp.layers[0]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: kept.update(whole=output[0])),
        model.decoder.register_forward_hook(lambda module, args, output: kept.update(main=output)),
    ]
    try:
        with torch.no_grad():
            model(ids, positions, attention_mask=None)
            embedded = model.embedding(input_ids=ids.roll(-1, dims=1), position_ids=positions)
            # Every position a sequence of its own: attention finds nothing but it.
            rotary = model.rotary_pos_emb(1) if hasattr(model, "rotary_pos_emb") else None
            kept["one"] = layer._proj_and_transformer_layer(
                hidden_states=kept["main"].transpose(0, 1),
                decoder_input=embedded.transpose(0, 1),
                rotary_pos_emb=rotary,
            ).transpose(0, 1)
            found = {}
            for name in ("whole", "one"):
                logits, _ = model.output_layer(kept[name])
                choice = logits[:, 0].argmax(-1).tolist()  # at place i of token i + 2
                places = range(PROMPT + 1, len(tokens))
                found[name] = [choice[place - 2] == tokens[place] for place in places]
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _mean(rows: list[list[bool]]) -> float:
    flat = [hit for row in rows for hit in row]
    return sum(flat) / len(flat)


def _by_place(rows: list[list[bool]]) -> list[tuple[int, float]]:
    """(tokens before, share right) for stretches of the answers."""
    points = []
    for begin in range(0, len(rows[0]), BUCKET):
        stretch = [row[begin : begin + BUCKET] for row in rows]
        points.append((PROMPT + 1 + begin + len(stretch[0]) // 2, _mean(stretch)))
    return points


def _draw(found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, colour in (
        ("whole", "whole context", "tab:blue"),
        ("one", "one position", "tab:orange"),
    ):
        places, shares = zip(*found["by_place"][name], strict=True)
        mean = found[f"teacher_forced_{name}"]
        axis.plot(places, shares, marker="o", markersize=4, color=colour, label=f"{label}: {mean:.1%}")
        axis.axhline(mean, color=colour, linewidth=0.8, linestyle="--")
    accepted = found["engine_acceptance"]
    axis.axhline(accepted, color="black", linewidth=0.8, label=f"accepted by the engine: {accepted:.1%}")
    axis.set(xlabel="tokens before the draft", ylabel="share of drafts that are right", ylim=(0, 1))
    axis.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
