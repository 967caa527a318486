"""How often the MTP layer's draft is right when it sees the whole context, and when it sees one position alone.

    python -m dsv3_megatron.studies.draft_acceptance --run runs/demo [--prompts 400] [--new-tokens 64] [--file FILE.png]

The demo's model continues held-out text greedily. On the same continuations: what the engine accepts with
`--speculative mtp`; how often the MTP layer's first choice is the token that comes, teacher-forced over the whole
context, at the places where the engine drafted and at all; the same where its attention sees the last verified
position alone, as in Megatron's own drafts. And on the held-out text itself: how often the layer's first choice is the
main model's first choice. Standard errors (`_se`) are over prompts, whose continuations are independent; that of the
difference is of pairs. The picture has the shares by the place in the text. What was measured is in FILE.jsonl, and the
same command goes on from there. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.serve.load import Layout, loaded_model, use_device
from dsv3_megatron.serve.source import open_source

__all__ = ["as_drafted", "main", "share"]

PROMPT = 32  # tokens of held-out text
BUCKET = 8  # tokens of a point in the picture
BATCH = 20  # prompts continued together, and kept together
KINDS = ("whole", "one", "held_out_whole", "held_out_one")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a demo's run")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--file", type=Path, default=Path("drafts.png"))
    options = parser.parse_args(argv)
    for name, least in (("prompts", 2), ("new_tokens", 2)):
        if getattr(options, name) < least:
            given = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise RefusedArgument(f"{given}: must be {least} or more")
    for needed in ("checkpoints", "corpus/valid.bin"):
        if not (options.run / needed).exists():
            raise RefusedArgument(f"--run {options.run}: has no {needed}; make demo writes such a folder")
    use_device("cpu")
    found = _summary(options, _measure(options))
    _draw(found, options.file)
    print(options.file, file=sys.stderr)
    print(json.dumps({key: value for key, value in found.items() if key != "by_place"}))
    return 0


def _texts(corpus: Path, count: int, length: int) -> list[list[int]]:
    """Evenly spaced stretches of the held-out documents."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(corpus))
    stream = np.concatenate([documents[i] for i in range(len(documents))])
    stride = (len(stream) - length) // count
    if stride < length:
        raise RefusedArgument(f"--prompts {count}: the held-out text has {len(stream)} tokens; use fewer")
    return [stream[i * stride : i * stride + length].tolist() for i in range(count)]


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per batch, those of an earlier call of the same command among them."""
    source = open_source(options.run / "checkpoints", None)
    if not source.architecture.mtp_num_layers:
        raise RefusedArgument(f"--run {options.run}: its model has no MTP layer")
    length = PROMPT + options.new_tokens
    if length > source.architecture.max_position_embeddings:
        longest = source.architecture.max_position_embeddings - PROMPT
        raise RefusedArgument(f"--new-tokens {options.new_tokens}: the model has room for {longest}")
    texts = _texts(options.run / "corpus" / "valid", options.prompts, length)
    settings = {"checkpoint": str(source.checkpoint), "prompts": len(texts), "new_tokens": options.new_tokens}
    file = options.file.with_suffix(".jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    known, *records = (
        [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [settings]
    )
    if known != settings:
        raise RefusedArgument(f"--file {options.file}: {file} is of other settings ({known}); name another")
    left = range(len(records) * BATCH, len(texts), BATCH)
    if not left:
        return records
    with loaded_model(source, Layout(), "fp32", "local") as model, open(file, "a") as out:
        if not file.stat().st_size:
            out.write(json.dumps(settings) + "\n")
        for begin in left:
            records.append(_measure_batch(model, texts[begin : begin + BATCH], options.new_tokens))
            out.write(json.dumps(records[-1]) + "\n")
            out.flush()
            done = min(begin + BATCH, len(texts))
            print(f"{done} of {len(texts)} prompts continued", file=sys.stderr, flush=True)
    return records


def _measure_batch(model: Any, texts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Drafts proposed and accepted by an engine, and of each text the hits of `KINDS`."""
    from dsv3_megatron.inference import Engine, EngineSettings, Sampling

    how = Sampling(max_new_tokens=new_tokens, temperature=0, ignore_ends=True)
    engine = Engine(model, EngineSettings(PROMPT + new_tokens, BATCH, speculative=True))
    prompts = [text[:PROMPT] for text in texts]
    answers = [generation.tokens for generation in engine.generate(prompts, how)]
    record: dict[str, Any] = {"proposed": engine.statistics.proposed, "accepted": engine.statistics.accepted}
    engine.close()
    greedy = [_choices(model, p + a) for p, a in zip(prompts, answers, strict=True)]
    held_out = [_choices(model, text) for text in texts]
    hits = (
        [choices.hits(choices.whole, choices.tokens[2:]) for choices in greedy],
        [choices.hits(choices.one, choices.tokens[2:]) for choices in greedy],
        [choices.hits(choices.whole, choices.main[1:]) for choices in held_out],
        [choices.hits(choices.one, choices.main[1:]) for choices in held_out],
    )
    for kind, rows in zip(KINDS, hits, strict=True):
        record[kind] = [[int(hit) for hit in row] for row in rows]
    return record


def _summary(options: argparse.Namespace, records: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {kind: [row for record in records for row in record[kind]] for kind in KINDS}
    proposed, accepted = (sum(record[key] for record in records) for key in ("proposed", "accepted"))
    found: dict[str, Any] = {
        "prompts": options.prompts,
        "new_tokens": options.new_tokens,
        "drafts": proposed,
        "engine_acceptance": accepted / proposed,
        "tokens_per_pass": 1 + accepted / proposed,
    }
    for name, hits in (
        ("teacher_forced_where_drafted", [as_drafted(row) for row in rows["whole"]]),
        ("teacher_forced_whole", rows["whole"]),
        ("teacher_forced_one", rows["one"]),
        ("teacher_forced_gain", _differences(rows["whole"], rows["one"])),
        ("held_out_whole", rows["held_out_whole"]),
        ("held_out_one", rows["held_out_one"]),
        ("held_out_gain", _differences(rows["held_out_whole"], rows["held_out_one"])),
    ):
        found[name], found[f"{name}_se"] = share(hits)
    found["by_place"] = {"whole": _by_place(rows["whole"]), "one": _by_place(rows["one"])}
    return found


def _differences(first: list[list[int]], second: list[list[int]]) -> list[list[int]]:
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]


@dataclass(frozen=True)
class _Choices:
    """First choices over one text: at place i, `main` of token i + 1, `whole` and `one` of token i + 2."""

    tokens: list[int]
    main: list[int]
    whole: list[int]
    one: list[int]

    def hits(self, drafts: list[int], wanted: list[int]) -> list[bool]:
        """Whether drafts are what is wanted (of token i + 2 too), after the prompt and the first token behind it."""
        first = PROMPT - 1
        end = len(self.tokens) - 2
        return [drafts[i] == wanted[i] for i in range(first, end)]


def _choices(model: Any, tokens: list[int]) -> _Choices:
    """Teacher-forced, by the trainer's own forward pass."""
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
            # Every position a sequence of its own: attention finds nothing but it, so that its rotation is no matter.
            kept["one"] = layer._proj_and_transformer_layer(
                hidden_states=kept["main"].transpose(0, 1), decoder_input=embedded.transpose(0, 1)
            ).transpose(0, 1)
            chosen = {
                name: model.output_layer(hidden)[0][:, 0].argmax(-1).tolist() for name, hidden in kept.items()
            }
    finally:
        for hook in hooks:
            hook.remove()
    return _Choices(tokens, **chosen)


def as_drafted(hits: Sequence[int]) -> list[int]:
    """The hits that an engine with one draft verifies: after an accepted draft comes a sample that was not drafted."""
    verified, place = [], 0
    while place < len(hits):
        verified.append(hits[place])
        place += 2 if hits[place] else 1
    return verified


def share(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over all, and its standard error where rows are independent but what is in a row is not (ratio estimate)."""
    sizes = [len(row) for row in rows]
    mean = sum(map(sum, rows)) / sum(sizes)
    spread = sum((sum(row) - mean * len(row)) ** 2 for row in rows) * len(rows) / (len(rows) - 1)
    return mean, float(spread**0.5 / sum(sizes))


def _by_place(rows: list[list[int]]) -> list[tuple[float, float, float]]:
    """(tokens before, share right, standard error) for stretches of the answers."""
    points = []
    for begin in range(0, len(rows[0]), BUCKET):
        stretch = [row[begin : begin + BUCKET] for row in rows]
        points.append((PROMPT + 1 + begin + len(stretch[0]) / 2, *share(stretch)))
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
        places, shares, errors = zip(*found["by_place"][name], strict=True)
        mean, error = found[f"teacher_forced_{name}"], found[f"teacher_forced_{name}_se"]
        label = f"{label}: {mean:.1%} ± {error:.1%}"
        axis.errorbar(places, shares, errors, marker="o", markersize=4, color=colour, label=label)
        axis.axhline(mean, color=colour, linewidth=0.8, linestyle="--")
    accepted = found["engine_acceptance"]
    axis.axhline(accepted, color="black", linewidth=0.8, label=f"accepted by the engine: {accepted:.1%}")
    axis.set(xlabel="tokens before the draft", ylabel="share of drafts that are right")
    axis.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
