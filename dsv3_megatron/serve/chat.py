"""`dsv3 chat`: talk to a fine-tuned model in a terminal.

    dsv3 chat --load runs/demo-sft/checkpoints --device cpu --system "You are brief."

The answer comes as it is written; the conversation goes on until /reset. Ctrl-C ends an answer, Ctrl-D or /exit the
chat. Lines may also come from a pipe.
"""

import argparse
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
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
from dsv3_megatron.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsv3_megatron.inference import Engine, Sampling

HELP = "/reset begins a new conversation, /exit ends; Ctrl-C ends an answer"
COMMANDS = ("/reset", "/exit", "/help")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    source = open_model(options)
    tokenizer = source.need_tokenizer("dsv3 chat")
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    tokenizer.chat(
        [*system, {"role": "user", "content": "Hello"}]
    )  # is there a template? before anything is loaded
    sampling = sampling_of(options, source)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text ends no conversation
    with opened_engine(options, source, prefix_caching=True) as engine:
        chat = Chat(engine, tokenizer, sampling, options.system, sys.stdout)
        for line in _lines():
            chat.take(line)
        if is_first_rank() and chat.num_drafts:
            print(f"{engine.statistics.acceptance:.1%} of the drafts accepted", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("dsv3 chat", __doc__)
    parser.add_argument("--system", help="what the model is told before the conversation")
    add_model_options(parser)
    add_sampling_options(parser, temperature=0.6, max_new_tokens=512)
    add_engine_options(parser, max_batch=1)
    return parser


def _lines() -> Iterator[str]:
    """What the user types, on every rank; ends with /exit or at the end of the input."""
    import torch.distributed as dist

    interactive = sys.stdin.isatty()
    if is_first_rank() and interactive:
        print(HELP, file=sys.stderr)
    while True:
        line: list[str | None] = [None]
        if is_first_rank():
            try:
                line = [input("> " if interactive else "")]
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
        dist.broadcast_object_list(line, src=0)
        if line[0] is None or line[0].strip() == "/exit":
            return
        if line[0].strip():
            yield line[0]


class Chat:
    """A conversation: what was said, and how the next line is answered.

    Args:
        system: message before the conversation, None for none.
        out: where answers are written as they come (by the first rank).

    Attributes:
        messages: of the conversation so far.
    """

    def __init__(
        self, engine: "Engine", tokenizer: Tokenizer, sampling: "Sampling", system: str | None, out: TextIO
    ):
        self._engine, self._tokenizer, self._sampling, self._out = engine, tokenizer, sampling, out
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self._turns = 0

    @property
    def num_drafts(self) -> int:
        """Tokens drafted so far."""
        return self._engine.statistics.proposed

    def take(self, line: str) -> None:
        """A command, or a message to answer."""
        if line.startswith("/"):
            self._command(line.strip())
            return
        self.messages.append({"role": "user", "content": line})
        try:
            answer = self._answer()
        except RefusedArgument as error:
            self.messages.pop()
            self._say(f"{error}; /reset begins a new conversation\n")
            return
        self.messages.append({"role": "assistant", "content": answer})

    def _command(self, command: str) -> None:
        if command == "/reset":
            self.messages = list(self._system)
            self._say("new conversation\n")
        else:
            self._say(f"{HELP}\n" if command == "/help" else f"{command}: there are {', '.join(COMMANDS)}\n")

    def _answer(self) -> str:
        from dsv3_megatron.inference.sampling import request_seed
        from dsv3_megatron.inference.text import TextStream

        stream = TextStream(self._tokenizer.decode, self._sampling.stop)

        def show(tokens: list[int]) -> None:
            for token in tokens:
                if not stream.stopped:
                    self._say(stream.push([token]))

        self._turns += 1
        prompt = self._tokenizer.chat(self.messages)
        seed = request_seed(self._sampling.seed, self._turns)
        request = self._engine.submit(prompt, self._sampling, seed, show)
        with _interrupts() as interrupts:
            while self._engine.busy:
                self._engine.step()
                if interrupts:
                    self._engine.abort(request)
            self._say(stream.finish() + "\n")
        return stream.text

    def _say(self, text: str) -> None:
        if text and is_first_rank():
            self._out.write(text)
            self._out.flush()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C, so that it has its effect between two steps."""
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        caught.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
