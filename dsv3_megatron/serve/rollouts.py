"""`dsv3 rollouts`: responses for a GRPO trainer that is another job, on this job's devices, in this job's layout.

    dsv3 rollouts --load BASE/checkpoints --connect TRAINER:29600                          beside
    torchrun … -m dsv3_megatron train-hydra recipe=grpo … rollout_address=TRAINER:29600

The model is that of `--load` (the trainer's `pretrained_checkpoint` will do); its weights come from the trainer before
each rollout, through host memory. Lengths, batch, temperature and precision are the trainer's. Ends with the trainer.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.serve.options import (
    add_model_options,
    is_first_rank,
    layout_of,
    new_parser,
    open_model,
    opened_engine,
)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    from dsv3_megatron.posttrain.bridge import BridgeClosed, split_address

    options = _parser().parse_args(argv)
    try:
        split_address(options.connect)
    except RefusedArgument as error:
        raise RefusedArgument(f"--connect {error}") from None
    if layout_of(options).deployment.has_slots:
        raise RefusedArgument("--redundant-experts: copies of experts would keep old weights; leave it out")
    try:
        _serve(options)
    except BridgeClosed as error:
        print(f"error: {error}; start both again, the trainer goes on from its checkpoint", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("dsv3 rollouts", __doc__)
    parser.add_argument(
        "--connect", required=True, metavar="HOST:PORT", help="the trainer's --rollout-address"
    )
    add_model_options(parser)
    return parser


def _serve(options: argparse.Namespace) -> None:
    from dsv3_megatron.posttrain.bridge import Bridge

    options.max_length = options.cache_gb = None
    options.max_batch, options.max_step_tokens, options.speculative = 1, 2048, None
    source = open_model(options)
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bridge = Bridge(options.connect, 1 + rank, 1 + count)
    asked = bridge.told()
    options.max_length, options.max_batch, options.dtype = (
        asked[name] for name in ("max_length", "max_batch", "dtype")
    )
    options.max_step_tokens = max(options.max_step_tokens, options.max_batch)
    with opened_engine(options, replace(source, ends=tuple(asked["ends"]))) as engine:
        job = _Job(engine, bridge, asked)
        while (message := bridge.told()) is not None:
            job.rollout(message)


class _Job:
    """What a rollout rank does for the trainer."""

    def __init__(self, engine: Any, bridge: Any, asked: dict[str, Any]) -> None:
        from megatron.core import parallel_state as groups

        from dsv3_megatron.inference import Sampling
        from dsv3_megatron.posttrain.temperature import Temperature

        self.engine, self.bridge = engine, bridge
        self.rank, self.size = groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()
        self.first = groups.get_tensor_model_parallel_rank() == 0 and groups.is_pipeline_first_stage(
            ignore_virtual=True
        )
        # The temperature is in the logits: the engine's log-probabilities are then of what it draws from.
        self.sampling = Sampling(max_new_tokens=asked["max_new_tokens"], log_probs=True)
        temperature = Temperature(asked["temperature"])
        temperature.follow([engine.model])
        temperature.on = True
        self._find_weights(asked["weights"])
        self.done = 0

    def _find_weights(self, described: list[Any]) -> None:
        """Where each of the trainer's tensors goes on this rank."""
        from dsv3_megatron.specs.names import global_names, named_weights

        names = global_names(self.engine.model)
        own = {
            names[local].name: (weight, names[local].shard)
            for local, weight in named_weights(self.engine.model).items()
        }
        self.weights = [(tuple(shape), dtype, own.get(name)) for name, shape, dtype in described]
        given = {name: tuple(shape) for name, shape, _ in described}
        for name, (weight, shard) in own.items():
            here = shard.full_shape(weight.shape)
            if given.get(name) != here:
                raise RefusedArgument(
                    f"--load: {name} is {list(here)} here and {list(given.get(name, ())) or 'missing'} in the trainer: "
                    "give the checkpoint that the trainer began with"
                )

    def rollout(self, message: dict[str, Any]) -> None:
        """Take over the weights, draw this rank's part of the responses, answer."""
        import torch

        with torch.no_grad():
            for shape, dtype, place in self.weights:
                full = self.bridge.broadcast(
                    torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
                )
                if place is not None:
                    weight, shard = place
                    weight.copy_(shard.take(full))
        self.engine.refresh()
        prompts, seeds = message["prompts"], message["seeds"]
        mine = range(self.rank, len(prompts), self.size)
        results = self.engine.generate(
            [prompts[i] for i in mine], self.sampling, seeds=[seeds[i] for i in mine]
        )
        found = {i: (r.tokens, r.log_probs, r.finish_reason) for i, r in zip(mine, results, strict=True)}
        self.bridge.answer(found if self.first else {})
        self.done += 1
        if is_first_rank():
            print(f"[rollouts] {self.done}: {len(prompts)} responses", file=sys.stderr, flush=True)
