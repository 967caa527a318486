"""Rollouts: responses to prompts by the engine, on the weights that are trained, and what they are worth.

The engine runs on the trainer's own model where there is no pipeline (no copy at all). With one, each rank keeps a
whole copy, filled from the trainer's ranks before each rollout, never through a disk. With `--rollout-address` the
engine is another job's (`apart`).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.posttrain.apart import RolloutRanks
from dsv3_megatron.posttrain.rollouts import Prompt, Sample
from dsv3_megatron.posttrain.routes import RouteRecorder
from dsv3_megatron.posttrain.temperature import Temperature
from dsv3_megatron.rewards import Scorer

__all__ = ["Generator"]


class Generator:
    """Makes the samples of a rollout; the same calls on every rank.

    Args:
        encoder: the tokenizer, with `decode` and `special_ids`.
        temperature: of the trained model's logits; the engine's own stays 1.
    """

    def __init__(self, args: Any, encoder: Any, temperature: Temperature) -> None:
        from dsv3_megatron.data.vocabulary import EOS

        self.args, self.encoder, self.end = args, encoder, encoder.special_ids[EOS]
        self.temperature = temperature
        self.scorer = Scorer(args.reward, timeout_s=args.reward_timeout, on_failure=args.bad_reward)
        self._engine: Any = None
        self._copy: Any = None
        self._apart: RolloutRanks | None = None  # rollout ranks of their own
        self.recorder: RouteRecorder | None = None

    def samples(
        self, model: list[Any], prompts: Sequence[Prompt], iteration: int
    ) -> tuple[list[Sample], int]:
        """`--samples-per-prompt` responses to each prompt, in their order, and how many had no reward of their own.

        Sample i draws by (--seed, iteration, i) alone: layout, batching and restarts make no difference to the noise.
        """
        from dsv3_megatron.inference.sampling import request_seed

        args = self.args
        count = len(prompts) * args.samples_per_prompt
        seed = request_seed(args.seed, iteration)
        asked = [prompts[i // args.samples_per_prompt].tokens for i in range(count)]
        mine, results, first = self._drawn(model, asked, [request_seed(seed, i) for i in range(count)])
        found = self._judged(prompts, mine, results, first) if self._answers else {}
        shared: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shared, found)
        everything = {i: entry for part in shared for i, entry in part.items()}
        return [everything[i][0] for i in range(count)], sum(everything[i][1] for i in range(count))

    def _drawn(
        self, model: list[Any], asked: Sequence[list[int]], seeds: Sequence[int]
    ) -> tuple[range, Sequence[Any], int]:
        """Numbers of the samples that are this rank's, the engine's results, and its number of the first of them."""
        from dsv3_megatron.inference import Sampling

        if self.args.rollout_address:
            if self._apart is None:
                self._apart = RolloutRanks(model, self.args, [self.end])
            results = self._apart.generate(model, asked, seeds)
            return range(len(results)), results, 0
        engine = self._ready(model)
        mine = self._own(len(asked))
        first = engine.next_number
        with nullcontext() if self.recorder is None else self.recorder.recording():
            drawn = engine.generate(
                [asked[i] for i in mine],
                Sampling(max_new_tokens=self.args.max_response_length, log_probs=True),
                seeds=[seeds[i] for i in mine],
            )
        return mine, drawn, first

    def finish(self) -> None:
        """After the last rollout."""
        if self._apart is not None:
            self._apart.end()

    def _judged(
        self, prompts: Sequence[Prompt], mine: Sequence[int], results: Sequence[Any], first: int
    ) -> dict[int, tuple[Sample, bool]]:
        """Samples by their number, and whether a reward failed, which costs the sample and never the run."""
        asked = [prompts[i // self.args.samples_per_prompt] for i in mine]
        scores = self.scorer.score(
            [prompt.text for prompt in asked],
            [self._text(result) for result in results],
            [prompt.answer for prompt in asked],
        )
        found = {}
        for place, (i, prompt, result, score) in enumerate(zip(mine, asked, results, scores, strict=True)):
            routing = None
            if self.recorder is not None:
                routing = self.recorder.routes(first + place, len(prompt.tokens) + len(result.tokens) - 1)
            finished = result.finish_reason == "stop"
            number = i // self.args.samples_per_prompt
            sample = Sample(
                number, list(result.tokens), list(result.log_probs), finished, score.value, routing
            )
            found[i] = sample, not score.ok
            if not score.ok:
                print(
                    f"> grpo: --bad-reward {score.value:g} for a sample: {score.outcome}, {score.detail}",
                    flush=True,
                )
        return found

    def _text(self, result: Any) -> str:
        """A response without the token that ended it."""
        tokens = list(result.tokens)
        finished = result.finish_reason == "stop"
        return self.encoder.decode(tokens[:-1] if finished and tokens[-1] == self.end else tokens)

    # --- who generates what

    def _own(self, number: int) -> range:
        """Samples that this rank generates: its data-parallel part, or its part of the world with copies."""
        if self._copy is not None:
            return range(dist.get_rank(), number, dist.get_world_size())
        from megatron.core import mpu

        return range(mpu.get_data_parallel_rank(), number, mpu.get_data_parallel_world_size())

    @property
    def _answers(self) -> bool:
        """Whether this rank calls the reward: one of those that have the same samples."""
        if self._apart is not None:
            return dist.get_rank() == 0
        if self._copy is not None:
            return True
        from megatron.core import mpu

        return mpu.get_tensor_model_parallel_rank() == 0

    def _ready(self, model: list[Any]) -> Any:
        """The engine with the model's present weights."""
        if self._engine is None:
            self._build(model)
        if self._copy is not None:
            self._copy.fill(model)
        self._engine.refresh()
        return self._engine

    def _build(self, model: list[Any]) -> None:
        from dsv3_megatron.inference import Engine, EngineSettings
        from dsv3_megatron.posttrain.whole_copy import WholeCopy, needs_copy

        served = model[0]
        if needs_copy(model):
            self._copy = WholeCopy(model, self.args)
            served = self._copy.model
            self.temperature.follow([served])
        settings = EngineSettings(
            max_length=self.args.seq_length,
            max_batch=self.args.rollout_batch,
            max_step_tokens=max(2048, self.args.rollout_batch),
        )
        try:
            self._engine = Engine(served, settings, ends=[self.end])
        except RefusedArgument as error:
            raise RefusedArgument(f"--posttrain grpo: {error}") from None
        if self.args.routing_replay:
            self.recorder = RouteRecorder(self._engine)
