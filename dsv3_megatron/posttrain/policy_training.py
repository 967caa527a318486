"""GRPO in the trainer: rollouts by the engine, rewards, this step's data and loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.files import whole
from dsv3_megatron.posttrain.arguments import samples_per_row
from dsv3_megatron.posttrain.generation import Generator
from dsv3_megatron.posttrain.policy_loss import group_advantages, grpo_terms, truncated_weights
from dsv3_megatron.posttrain.reference import ReferenceWeights
from dsv3_megatron.posttrain.rollouts import Prompt, Sample, chosen_prompts, mtp_weights, read_prompts, row_of
from dsv3_megatron.posttrain.routes import replayed, routes_of_tokens
from dsv3_megatron.posttrain.run import FOLDER, Kept, Run, checkpoints, repeated
from dsv3_megatron.posttrain.temperature import Temperature

__all__ = ["PolicyTraining", "placeholder"]


@dataclass
class Rollout:
    """Samples of a rollout and what training knows of them; the same on every rank.

    Attributes:
        first_iteration: of the steps on it.
        sequences: ids of prompt and response of each sample.
        prompt_lengths: of each sample.
        learnt: which samples are learnt from.
        advantages: fp32 [N].
        engine, old, reference: log π of the token at each position, fp32 [N, longest]: by the engine; by the trainer
            before the first step (None on policy, where it is the step's own); by the reference (None without).
        routing: experts that the engine chose for each sample's tokens (see `rollouts.Sample`); None without replay.
        layers: numbers of the layers whose experts these are.
    """

    first_iteration: int
    sequences: list[list[int]]
    prompt_lengths: list[int]
    learnt: list[bool]
    advantages: Tensor
    engine: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    routing: list[Tensor] | None = None
    layers: list[int] | None = None

    @property
    def response_lengths(self) -> Tensor:
        return torch.tensor(
            [len(ids) - n for ids, n in zip(self.sequences, self.prompt_lengths, strict=True)]
        )


class PolicyTraining(Run):
    """What `--posttrain grpo` does around Megatron's steps, on one rank."""

    def __init__(self, args: Any) -> None:
        from dsv3_megatron.data.vocabulary import BOS, EOS, DocumentEncoder

        super().__init__(args)
        self.encoder = DocumentEncoder(Path(args.tokenizer_model))
        self.encoder.require((BOS, EOS), "--tokenizer-model")
        self.per_row = samples_per_row(args)
        self.prompts = self._read_prompts()
        self.temperature = Temperature(args.rollout_temperature)
        self.generator = Generator(args, self.encoder, self.temperature)
        self.reference: ReferenceWeights | None = None
        self.rollout: Rollout | None = None
        self._balance = 1.0

    def _read_prompts(self) -> list[Prompt]:
        from dsv3_megatron.data.vocabulary import BOS, EOS
        from dsv3_megatron.sft.conversation import Conversation
        from dsv3_megatron.sft.rendering import Rendering

        args, special = self.args, self.encoder.special_ids
        begin = special[BOS if args.text_begin == "begin" else EOS]

        @cache  # the tokenizer is read once, and only where there are messages
        def template() -> Any:
            return Rendering(Path(args.tokenizer_model)).build()

        def render(messages: list[Any]) -> list[int]:
            tokens: list[int] = template().prompt(Conversation.of(messages))
            return tokens

        try:
            found = read_prompts(
                Path(args.prompt_data), lambda text: [begin, *self.encoder.encode(text)], render
            )
        except ValueError as error:
            raise RefusedArgument(f"--prompt-data {args.prompt_data}: {error}") from None
        room = args.seq_length // self.per_row - args.max_response_length
        fitting = [prompt for prompt in found if len(prompt.tokens) <= room]
        if len(fitting) < len(found):
            self.say(
                f"{len(found) - len(fitting)} of {len(found)} prompts are longer than {room} tokens, and left out"
            )
        if not fitting:
            raise RefusedArgument(
                f"--seq-length {args.seq_length}: {self.per_row} samples of a row with --max-response-length "
                f"{args.max_response_length} leave {room} tokens for each prompt, which none fits into. Use a longer "
                "one, or a larger --global-batch-size"
            )
        return fitting

    # --- rollouts

    def after_load(self, call: dict[str, Any], iteration: int) -> None:
        self.temperature.follow(call["ddp_model"])
        if self.args.policy_beta:
            self.reference = ReferenceWeights(call["ddp_model"])
            self.begin_reference(self.reference, iteration)

    def before_update(self, call: dict[str, Any]) -> None:
        self.temperature.on = False
        if call["iteration"] + 1 == self.args.train_iters:
            self.generator.finish()

    def before_step(self, call: dict[str, Any]) -> None:
        self.temperature.on = True
        iteration, updates = call["iteration"], self.args.updates_per_rollout
        phase = iteration % updates
        if phase == 0:
            self._renew_reference(iteration)
            self.rollout = self._collect(call["model"], iteration)
        elif self.rollout is None:
            self.rollout = self._read_rollout(iteration - phase)
        rollout = self.rollout
        assert rollout is not None
        numbers = self._samples_of_step(phase)
        valid = sum(len(rollout.sequences[i]) for i in numbers)
        learnt = [i for i in numbers if rollout.learnt[i]]
        counted = len(learnt) if self.args.policy_reduction == "sequence" else self._response_tokens(learnt)
        self._balance = counted / max(valid, 1)
        call["data_iterator"] = repeated(self._own_batches(numbers), call["data_iterator"])

    def _samples_of_step(self, phase: int) -> range:
        size = self.per_row * self.args.global_batch_size
        return range(phase * size, (phase + 1) * size)

    def _response_tokens(self, numbers: Sequence[int]) -> int:
        assert self.rollout is not None
        lengths = self.rollout.response_lengths
        return int(lengths[list(numbers)].sum()) if numbers else 0

    def _renew_reference(self, iteration: int) -> None:
        every = self.args.renew_reference
        if self.reference is not None and every and iteration and iteration % every == 0:
            self.reference.renew()
            self.keep_reference(self.reference, iteration)
            self.say(f"the reference model is that of iteration {iteration}")

    def _collect(self, model: list[Any], iteration: int) -> Rollout:
        args = self.args
        number = iteration // args.updates_per_rollout
        chosen = chosen_prompts(len(self.prompts), args.prompts_per_rollout, number, args.seed)
        prompts = [self.prompts[i] for i in chosen]
        samples, bad = self.generator.samples(model, prompts, iteration)
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
        true_mean = float(rewards.mean())
        if args.shuffle_rewards:
            rewards = rewards[
                torch.from_numpy(np.random.default_rng([args.seed, iteration]).permutation(len(rewards)))
            ]
        groups = rewards.view(args.prompts_per_rollout, args.samples_per_prompt)
        advantages = group_advantages(groups, args.advantage_deviation).flatten().float()
        rollout = Rollout(
            first_iteration=iteration,
            sequences=[[*prompts[s.prompt].tokens, *s.tokens] for s in samples],
            prompt_lengths=[len(prompts[s.prompt].tokens) for s in samples],
            learnt=[s.usable for s in samples],
            advantages=advantages,
            engine=_table(samples, prompts),
        )
        if self.generator.recorder is not None:
            rollout.routing = [s.routing for s in samples if s.routing is not None]
            rollout.layers = self.generator.recorder.layers
        self.rollout = rollout
        if args.updates_per_rollout > 1:
            rollout.old = self._score(model, self.replay)
        if self.reference is not None:
            with self.reference.in_place():
                rollout.reference = self._score(model)
        self._keep_rollout()
        alike = (groups == groups[:, :1]).all(1).float().mean()
        self.note(
            {
                "reward": true_mean,
                "response length": float(rollout.response_lengths.double().mean()),
                "finished": sum(s.finished for s in samples) / len(samples),
                "groups alike": float(alike),
                "bad rewards": float(bad),
                "bad samples": float(sum(not s.usable for s in samples)),
            }
        )
        return rollout

    def _score(self, model: list[Any], around: Any = None) -> Tensor:
        """log π of all samples under the weights that the model has now, by the trainer's schedule."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        from dsv3_megatron.posttrain.scoring import score, to_table

        assert self.rollout is not None
        found = []
        for phase in range(self.args.updates_per_rollout):
            batches = self._own_batches(self._samples_of_step(phase))
            found += score(model, partial(_copies, batches), get_num_microbatches(), around)
        table, _ = to_table(found, tuple(self.rollout.engine.shape))  # type: ignore[arg-type]
        return table.float().cpu()

    def _keep_rollout(self) -> None:
        """A run that goes on in the midst of a rollout needs it: its policy is gone."""
        save, updates = self.args.save, self.args.updates_per_rollout
        if save is None or updates == 1 or torch.distributed.get_rank() != 0:
            return
        assert self.rollout is not None
        kept = Kept(Path(save) / FOLDER, "rollout")
        file = kept.file(self.rollout.first_iteration)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            torch.save(vars(self.rollout), unfinished)
        kept.keep(saved - saved % updates for saved in checkpoints(save))

    def _read_rollout(self, first_iteration: int) -> Rollout:
        folder = Path(self.args.save or self.args.load) / FOLDER
        file = Kept(folder, "rollout").file(first_iteration)
        if file.is_file():
            return Rollout(**torch.load(file, map_location="cpu", weights_only=True))
        raise RefusedArgument(
            f"--updates-per-rollout {self.args.updates_per_rollout}: the rollout of iteration {first_iteration}, which "
            f"the run goes on with, is not in {file}. Load a checkpoint of a multiple of so many steps"
        )

    @contextmanager
    def replay(self, model: Any, batch: dict[str, Any]) -> Iterator[None]:
        """As `hooks.around_forward`: the chunk chooses the experts of the rollout, where they are to be replayed."""
        rollout = self.rollout
        if rollout is None or rollout.routing is None or rollout.layers is None:
            yield
            return
        table = routes_of_tokens(batch["sequence"].flatten(), batch["cu_seqlens"].flatten(), rollout.routing)
        with replayed(model, table, rollout.layers):
            yield

    # --- a step

    def _own_batches(self, numbers: Sequence[int]) -> list[dict[str, Tensor]] | None:
        """This data-parallel rank's microbatches of a step with these samples; None on ranks that read none."""
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from torch.utils.data import default_collate

        if mpu.get_tensor_model_parallel_rank() != 0:
            return None
        rows = [numbers[start : start + self.per_row] for start in range(0, len(numbers), self.per_row)]
        size, dp_size = self.args.micro_batch_size, mpu.get_data_parallel_world_size()
        batches = []
        for m in range(get_num_microbatches()):
            first = (m * dp_size + mpu.get_data_parallel_rank()) * size
            batches.append(default_collate([self._row(row) for row in rows[first : first + size]]))
        return batches

    def _row(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        rollout = self.rollout
        assert rollout is not None
        sequences = [
            (i if rollout.learnt[i] else -1, rollout.sequences[i], rollout.prompt_lengths[i]) for i in numbers
        ]
        mtp = (
            partial(mtp_weights, reduction=self.args.policy_reduction)
            if self.args.posttrain_mtp_loss
            else None
        )
        return row_of(sequences, self.args.seq_length, self.encoder.pad_id, mtp)

    def loss(self, batch: dict[str, Any], losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over the tokens, or the sequences' means, of a microbatch; their number; and what is logged."""
        args, rollout = self.args, self.rollout
        assert rollout is not None
        sequence = batch["sequence"].flatten()
        inside = sequence >= 0
        numbers, positions = sequence[inside].cpu(), batch["position_ids"].flatten()[inside].cpu() + 1
        logp = -losses.flatten().float()[inside]

        def of(table: Tensor) -> Tensor:
            return table[numbers, positions].to(logp)

        new, engine = logp.detach(), of(rollout.engine)
        old = new if rollout.old is None else of(rollout.old)
        weights = truncated_weights(old, engine, args.importance_limit) if args.importance_limit else None
        terms = grpo_terms(
            logp,
            old,
            None if rollout.reference is None else of(rollout.reference),
            rollout.advantages[numbers].to(logp),
            torch.ones_like(logp),
            args.policy_clip,
            args.policy_beta,
            weights=weights,
        )
        tokens = len(numbers)
        if args.policy_reduction == "sequence":
            total = (terms.loss / rollout.response_lengths[numbers].to(logp)).sum()
            count = len(numbers.unique())
        else:
            total, count = terms.loss.sum(), tokens
        if not tokens:
            total = losses.sum() * 0  # the graph must exist
        report = {
            "loss": (total, max(count, 1) if not tokens else count),
            "kl": (terms.kl.sum(), tokens),
            "ratio": (terms.ratio.sum(), tokens),
            "clipped": (terms.clipped.sum(), tokens),
            "entropy estimate": (-new.sum(), tokens),
            "engine mismatch": ((old - engine).abs().sum(), tokens),
        }
        if weights is not None:
            report["importance weight"] = (weights.sum(), tokens)
            report["truncated"] = ((old - engine).exp().gt(args.importance_limit).sum(), tokens)
        return self.finish_loss(total, torch.tensor(count, dtype=torch.int, device=losses.device), report)

    def balance_scale(self) -> float:
        return self._balance


def _copies(batches: list[dict[str, Tensor]] | None) -> Iterator[dict[str, Tensor]] | None:
    """Megatron's get_batch writes into the dicts it is given."""
    return None if batches is None else iter([dict(batch) for batch in batches])


def _table(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> Tensor:
    """The engine's log-probabilities [N, longest], each where its token stands in the sequence."""
    starts = [len(prompts[s.prompt].tokens) for s in samples]
    longest = max(start + len(s.tokens) for start, s in zip(starts, samples, strict=True))
    table = torch.zeros(len(samples), longest)
    for row, start, sample in zip(table, starts, samples, strict=True):
        row[start : start + len(sample.tokens)] = torch.tensor(sample.log_probs)
    return table


class _Nothing(torch.utils.data.Dataset):
    """Megatron wants a data set; the samples of a step come from the model."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": torch.zeros(1, dtype=torch.int64)}


def placeholder(num_samples: Sequence[int], built_here: bool) -> list[Any]:
    """Training, validation and test data sets of a run that reads none."""
    return [_Nothing(num_samples[0]) if built_here else None, None, None]
