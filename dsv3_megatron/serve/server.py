"""`dsv3 serve`: the model behind OpenAI's API, `/v1/completions` and `/v1/chat/completions`.

    dsv3 serve --load runs/demo-sft/checkpoints --device cpu --port 8000
    torchrun --nproc-per-node 8 -m dsv3_megatron serve --hf DIR --expert-model-parallel-size 8

Streams, log-probabilities, stop strings, seeds. More requests than --max-requests get 429; SIGTERM or Ctrl-C writes the
answers under way to the end.
"""

import argparse
import importlib.util
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.serve.options import (
    add_engine_options,
    add_model_options,
    is_first_rank,
    new_parser,
    open_model,
    opened_engine,
)
from dsv3_megatron.serve.source import Source

if TYPE_CHECKING:
    from dsv3_megatron.inference.server.app import Served

PACKAGES = ("quart", "hypercorn", "zmq", "msgpack")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedArgument(f"dsv3 serve needs {', '.join(missing)}: pip install 'dsv3_megatron[serve]'")
    if options.max_requests < 1:
        raise RefusedArgument(f"--max-requests {options.max_requests}: must be 1 or more")
    if not 0 <= options.grace_seconds < float("inf"):
        raise RefusedArgument(f"--grace-seconds {options.grace_seconds}: must be 0 or more, and finite")
    if options.rebalance_interval:
        raise RefusedArgument(
            f"--rebalance-interval {options.rebalance_interval}: the server's ranks do not count their steps together; "
            "leave it out (dsv3 generate has it)"
        )
    source = open_model(options)
    if is_first_rank():
        _check_address(options.host, options.port)
    name = options.model_name or source.folder.resolve().name
    # Imported after `open_model`, which prepares the CPU.
    from dsv3_megatron.inference.server.messages import IdsTokenizer, ServedEngine
    from dsv3_megatron.inference.server.run import Address, run_server

    with opened_engine(
        options,
        source,
        engine_class=ServedEngine,
        tokenizer=IdsTokenizer(),
        prefix_caching=not options.no_prefix_caching,
    ) as engine:
        return run_server(
            engine,
            _served(source, name, options.max_length),
            Address(options.host, options.port, options.coordinator_host),
            options.max_requests,
            options.grace_seconds,
            lambda: _announce(options, name),
        )


def _check_address(host: str, port: int) -> None:
    """Raise `RefusedArgument` where nothing can listen there; before the model is loaded."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedArgument(f"--host {host} --port {port}: {reason}; name another") from error


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("dsv3 serve", __doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for everyone (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--model-name", help="in the API (default: the folder's name)")
    parser.add_argument(
        "--max-requests",
        type=int,
        default=256,
        help="answers written or waited for at a time; more get 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=30.0,
        help="for answers under way at the end (default: %(default)s)",
    )
    parser.add_argument("--no-prefix-caching", action="store_true", help="compute each prompt anew")
    parser.add_argument(
        "--coordinator-host",
        default="127.0.0.1",
        help="address of the first rank for the others; needed over several nodes (default: %(default)s)",
    )
    add_model_options(parser)
    add_engine_options(parser, max_batch=64)
    return parser


def _served(source: Source, name: str, max_length: int) -> "Served":
    from dsv3_megatron.inference.server.app import Served
    from dsv3_megatron.inference.server.requests import Limits

    limits = Limits(name, max_length, source.architecture.vocab_size)
    tokenizer = source.tokenizer
    if tokenizer is None:
        return Served(limits, source.ends, None, None, None, None)

    return Served(
        limits,
        source.ends,
        tokenizer.encode,
        tokenizer.decode,
        tokenizer.token_text,
        tokenizer.chat if tokenizer.has_chat else None,
    )


def _announce(options: argparse.Namespace, name: str) -> None:
    if is_first_rank():
        print(f"serving {name} at http://{options.host}:{options.port}/v1", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
