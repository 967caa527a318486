"""`dsv3 generate`: answers to the prompts of a JSONL file, batched, in the order of the input.

    dsv3 generate --load runs/demo/checkpoints --device cpu --prompts prompts.jsonl --output answers.jsonl
    torchrun --nproc-per-node 4 -m dsv3_megatron generate --expert-model-parallel-size 4 …

A line of the input is {"prompt": text or messages} or {"tokens": [ids]}; a line of the output {"prompt", "text",
"tokens"} with the generated ids, the one that ended the answer among them; "text" ends before a stop string, and is
null without a tokenizer. The same command again goes on where it was interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.serve.options import (
    add_engine_options,
    add_model_options,
    add_sampling_options,
    is_first_rank,
    new_parser,
    open_model,
    opened_engine,
    sampling_of,
)
from dsv3_megatron.serve.output import Answers
from dsv3_megatron.serve.prompts import Prompt, read_prompts
from dsv3_megatron.serve.source import Source

if TYPE_CHECKING:
    from dsv3_megatron.inference import Engine, Generation, Sampling
    from dsv3_megatron.inference.engine import Statistics

WINDOW = 8  # batches given to the engine at once; after each window data-parallel ranks bring their answers together
PROGRESS_S = 2.0


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parser_of("dsv3 generate", __doc__, max_new_tokens=128).parse_args(argv)
    source = open_model(options)
    sampling = sampling_of(options, source)
    prompts = read_prompts(options.prompts, source, options.max_length)
    answers = Answers(options.output, prompts, settings_of(options, source)) if is_first_rank() else None
    try:
        result = answer_all(options, source, prompts, sampling, answers)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    finally:
        if answers is not None:
            answers.close()
    if answers is not None:
        print(_summary(result, options.output), file=sys.stderr)
        if options.json:
            print(json.dumps(result))
    return 0


def parser_of(prog: str, description: str | None, max_new_tokens: int) -> argparse.ArgumentParser:
    """Options of a command that answers the prompts of a file."""
    parser = new_parser(prog, description)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    add_model_options(parser)
    add_sampling_options(parser, temperature=1.0, max_new_tokens=max_new_tokens)
    add_engine_options(parser, max_batch=64)
    return parser


def settings_of(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What the answers depend on (layout, batch and drafts change nothing but the rounding)."""
    names = (
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "ignore_eos",
        "seed",
        "dtype",
        "max_length",
    )
    model = (source.checkpoint or source.folder).resolve()
    tokenizer = None if options.tokenizer is None else str(options.tokenizer.resolve())
    return {"model": str(model), "tokenizer": tokenizer, **{name: getattr(options, name) for name in names}}


def answer_all(
    options: argparse.Namespace,
    source: Source,
    prompts: list[Prompt],
    sampling: "Sampling",
    answers: Answers | None,
) -> dict[str, Any]:
    """Answer what `answers` has not yet (None on other ranks than the first); returns what `--json` prints."""
    with opened_engine(options, source) as engine:
        from dsv3_megatron.inference.engine import cache_bytes_per_token

        job = _Job(engine, source, prompts, sampling, answers)
        job.run(options.max_batch * WINDOW)
        statistics = job.statistics()
        return {
            "requests": len(prompts),
            "tokens": 0 if answers is None else answers.num_tokens,
            "tokens_per_s": job.tokens_per_s,
            "acceptance": statistics.acceptance,
            "tokens_per_pass": statistics.tokens_per_pass,
            "cache_bytes_per_token": cache_bytes_per_token(engine.model.config),
        }


def _summary(result: dict[str, Any], output: Path) -> str:
    drafts = "" if result["acceptance"] is None else f", {result['acceptance']:.1%} of the drafts accepted"
    speed = "" if result["tokens_per_s"] is None else f", {result['tokens_per_s']:.1f} tokens/s"
    return f"{output}: {result['requests']} answers, {result['tokens']} tokens{speed}{drafts}"


class _Job:
    """The prompts that are not answered yet, shared out to the data-parallel ranks window by window."""

    def __init__(
        self,
        engine: "Engine",
        source: Source,
        prompts: list[Prompt],
        sampling: "Sampling",
        answers: Answers | None,
    ):
        from megatron.core import parallel_state as groups

        self.engine, self.source, self.prompts, self.sampling, self.answers = (
            engine, source, prompts, sampling, answers,
        )  # fmt: skip
        self.rank, self.size = groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()
        self._first_of_replica = (
            groups.get_tensor_model_parallel_rank() == 0
            and groups.is_pipeline_first_stage(ignore_virtual=True)
        )
        self._begin = self._printed = time.monotonic()
        self._new_tokens = self._new_answers = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Of this run; None where nothing was left to do."""
        return self._new_tokens / (time.monotonic() - self._begin) if self._new_tokens else None

    def run(self, window: int) -> None:
        """Answer the rest, `window` prompts per data-parallel rank at a time."""
        start = self._agreed(0 if self.answers is None else self.answers.done)
        self._begin = self._printed = time.monotonic()
        self._left = len(self.prompts) - start
        for begin in range(start, len(self.prompts), window * self.size):
            members = range(begin, min(begin + window * self.size, len(self.prompts)))
            self._run_window(list(members)[self.rank :: self.size])

    def _run_window(self, members: list[int]) -> None:
        from dsv3_megatron.inference.sampling import request_seed

        found: list[tuple[int, list[int]]] = []

        def finish(place: int, generation: "Generation") -> None:
            if self.size == 1:
                self._keep(members[place], generation.tokens)
            elif self._first_of_replica:
                found.append((members[place], generation.tokens))

        self.engine.generate(
            [self.prompts[index].tokens for index in members],
            self.sampling,
            on_finish=finish,
            seeds=[request_seed(self.sampling.seed, index) for index in members],
        )
        if self.size > 1:
            for answers in self._gathered(found):
                for index, tokens in answers:
                    self._keep(index, tokens)

    def _keep(self, index: int, tokens: list[int]) -> None:
        if self.answers is None:
            return
        self.answers.add(index, self._text(tokens), tokens)
        self._new_tokens += len(tokens)
        self._new_answers += 1
        now = time.monotonic()
        if now - self._printed >= PROGRESS_S or self._new_answers == self._left:
            self._printed = now
            rate = self._new_answers / (now - self._begin)
            print(
                f"generate {self.answers.done} of {len(self.prompts)} answers, {self.tokens_per_s:.1f} tokens/s, "
                f"{(self._left - self._new_answers) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _text(self, tokens: list[int]) -> str | None:
        from dsv3_megatron.inference.text import TextStream

        if self.source.decode is None:
            return None
        if not self.sampling.stop:
            return self.source.decode(tokens)
        stream = TextStream(self.source.decode, self.sampling.stop)
        stream.push(tokens)
        stream.finish()
        return stream.text

    def statistics(self) -> "Statistics":
        """Drafts of all data-parallel ranks."""
        from dsv3_megatron.inference.engine import Statistics

        own = self.engine.statistics
        counts = (own.proposed, own.accepted) if self._first_of_replica else (0, 0)
        everyone = self._gathered(counts)
        return Statistics(*map(sum, zip(*everyone, strict=True)))

    def _gathered(self, found: Any) -> list[Any]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return everyone

    def _agreed(self, value: int) -> int:
        """The first rank's value on every rank."""
        import torch.distributed as dist

        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


if __name__ == "__main__":
    sys.exit(main())
