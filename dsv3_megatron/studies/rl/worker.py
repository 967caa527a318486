"""One process of the demonstration: the trainer, with the held-out reward before, on the way and after.

An arm with `samples` also writes, after the last step, responses to training problems.
"""

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.files import write_whole
from dsv3_megatron.posttrain import counting
from dsv3_megatron.studies.rl.arm import Arm

HELD_OUT_PROBLEMS = 384
HELD_OUT_SEED = 7
RESPONSE = 8  # tokens at most


class HeldOut:
    """Hooks around the steps; writes {iteration: {"reward", "length"}} to a file."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.curve: dict[str, Any] = {str(iteration): values for iteration, values in arm.held_out().items()}
        self._engine: Any = None

    def before_step(self, call: dict[str, Any]) -> None:
        if call["iteration"] == 0:
            self._measure(call["model"], 0)

    def after_step(self, call: dict[str, Any], result: Any) -> None:
        iteration, last = call["iteration"] + 1, self.arm.iterations
        if iteration % self.arm.every == 0 or iteration == last:
            self._measure(call["model"], iteration)
        if iteration == last and self.arm.samples is not None:
            self._write_samples(call["model"], *self.arm.samples)

    def _measure(self, model: list[Any], iteration: int) -> None:
        problems = counting.problems(HELD_OUT_PROBLEMS, HELD_OUT_SEED, held_out=True)
        responses = self._responses(model, [prompt for prompt, _ in problems], seed=HELD_OUT_SEED)
        rewards = [counting.reward(p, text, a) for (p, a), (text, _) in zip(problems, responses, strict=True)]
        length = sum(count for _, count in responses) / len(responses)
        self.curve[str(iteration)] = {"reward": sum(rewards) / len(rewards), "length": length}
        write_whole(self.arm.held_out_file, json.dumps(self.curve, indent=2) + "\n")
        found = self.curve[str(iteration)]["reward"]
        print(f"[demo] held-out reward after {iteration} iterations: {found:.3f}", flush=True)

    def _write_samples(self, model: list[Any], seeds: Sequence[int], count: int, group: int) -> None:
        """Groups of responses to problems of each seed: what preferences are made of."""
        lines = []
        for seed in seeds:
            problems = counting.problems(count, seed, held_out=False)
            prompts = [prompt for prompt, _ in problems for _ in range(group)]
            responses = self._responses(model, prompts, seed=seed)
            for i, (prompt, answer) in enumerate(problems):
                texts = [text for text, _ in responses[i * group : (i + 1) * group]]
                lines.append({"seed": seed, "prompt": prompt, "answer": answer, "responses": texts})
        write_whole(self.arm.sample_file, "".join(json.dumps(line) + "\n" for line in lines))

    def _responses(self, model: list[Any], prompts: list[str], seed: int) -> list[tuple[str, int]]:
        """Text and number of tokens of one response each, at temperature 1."""
        from megatron.training import get_args

        from dsv3_megatron.data.vocabulary import EOS, DocumentEncoder
        from dsv3_megatron.inference import Engine, EngineSettings, Sampling

        encoder = DocumentEncoder(Path(get_args().tokenizer_model))
        end = encoder.special_ids[EOS]
        if self._engine is None:
            self._engine = Engine(model[0], EngineSettings(max_length=64, max_batch=256), ends=[end])
        self._engine.refresh()
        results = self._engine.generate(
            [[end, *encoder.encode(prompt)] for prompt in prompts],
            Sampling(max_new_tokens=RESPONSE, seed=seed),
        )
        found = []
        for result in results:
            tokens = result.tokens[:-1] if result.finish_reason == "stop" else result.tokens
            found.append((encoder.decode(tokens), len(result.tokens)))
        return found


def work(arm: Arm) -> None:
    """Train an arm from where it is to its end."""
    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv
    from dsv3_megatron.training import hooks

    held_out = HeldOut(arm)
    hooks.before_step(held_out.before_step)
    hooks.after_step(held_out.after_step)
    train.main(to_argv(compose(arm.all_overrides())))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"[demo] {used.ru_utime + used.ru_stime:.0f} s of processor time", flush=True)
