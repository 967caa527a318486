"""One training step of a micro model in any layout, under any schedule, and everything it computed.

    whole = run_step(Layout(), Problem())                       # one process
    split = run_step(Layout(pp=2, ep=2, world_size=4), Problem())
    assert_same_step(split, whole)

`train_rank` is what a rank does: it builds the chunks, splits the fixed global batch, runs the schedule
through Megatron's DDP and `finalize_model_grads`, and returns its part. `join` merges the ranks' parts by
global name and checks that copies of a parameter agree. Both take the schedule and the builder as
arguments, so that other schedules and placements are compared with the same code.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from torch import Tensor

from dsv3_megatron.specs.builder import DSV3ModelBuilder, DSV3ModelConfig
from dsv3_megatron.specs.names import Shard, global_names, named_weights, unwrap
from dsv3_megatron.specs.router import DSV3Router
from tests.harness import run_distributed
from tests.specs.models import micro_config

SEED = 1234


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the model is spread over `world_size` ranks; data parallelism takes the rest.

    `stages` is Megatron's layer layout as a list of lists, pipeline-major (chunk 0 of all ranks, then chunk
    1, …); None splits the decoder layers evenly.
    """

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    stages: tuple[tuple[str, ...], ...] | None = None

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def vpp(self) -> int | None:
        """Model chunks per rank, None for one."""
        chunks = 1 if self.stages is None else len(self.stages) // self.pp
        return chunks if chunks > 1 else None

    def initialize(self) -> None:
        """Megatron's process groups and random state for this layout."""
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=1,
            # The embedding is also where MTP needs it.
            get_embedding_ranks=lambda ranks, split_rank=None: sorted({ranks[0], ranks[-1]}),
        )
        model_parallel_cuda_manual_seed(SEED)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is computed, whatever the layout: model, global batch and kind of loss.

    Attributes:
        num_sequences: global batch; with `micro_batch_size` it gives each rank's microbatches.
        valid_tokens: per sequence, how many of its tokens have a loss; None means all.
        padded_tokens: per sequence, how many tokens at its end are padding (not routed for the record, no
            loss).
        per_token_loss: divide by the valid tokens of the global batch rather than average microbatch means.
        dtype: parameters' dtype; in fp64 the cross-entropy and the router compute in fp64 too.
        overrides: further fields of MLATransformerConfig, as pairs (hashable).
        ddp: fields of DistributedDataParallelConfig, as pairs.
    """

    num_sequences: int = 8
    seq_length: int = 16
    micro_batch_size: int = 1
    num_layers: int = 4
    valid_tokens: tuple[int, ...] | None = None
    padded_tokens: tuple[int, ...] | None = None
    per_token_loss: bool = False
    dtype: torch.dtype = torch.float32
    overrides: tuple[tuple[str, Any], ...] = ()
    ddp: tuple[tuple[str, Any], ...] = ()

    def config(self, layout: Layout) -> DSV3ModelConfig:
        """The micro model for one layout: dense first layer, MoE, MTP; gradients large enough to compare."""
        fields: dict[str, Any] = {
            "num_layers": self.num_layers,
            "moe_layer_freq": [0] + [1] * (self.num_layers - 1),
            "mtp_num_layers": 1,
            "mtp_loss_scaling_factor": 0.3,
            "moe_aux_loss_coeff": 0.01,
            "init_method_std": 0.1,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "moe_router_dtype": "fp64" if self.dtype == torch.float64 else "fp32",
            "calculate_per_token_loss": self.per_token_loss,
            "tensor_model_parallel_size": layout.tp,
            "sequence_parallel": layout.tp > 1,
            "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": layout.vpp,
            "context_parallel_size": layout.cp,
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": 1,
        }
        if layout.vpp is not None:
            # Batched, the messages of two chunks between the same two ranks would be mixed up at pp = 2.
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        if layout.stages is not None:
            fields["pipeline_model_parallel_layout"] = [list(stage) for stage in layout.stages]
        return micro_config(seed=SEED, **(fields | dict(self.overrides)))

    def global_batch(self, vocab_size: int, seed: int = 0) -> dict[str, Tensor]:
        """tokens, labels, position_ids int64, loss_mask fp32, padding_mask bool (True = padding): [B, S]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_sequences, self.seq_length)
        tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator)
        position = torch.arange(self.seq_length).expand(shape)
        valid = torch.tensor(self.valid_tokens or (self.seq_length,) * self.num_sequences)
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": position.contiguous(),
            "loss_mask": (position < valid[:, None]).float(),
        }
        if self.padded_tokens is not None:
            kept = self.seq_length - torch.tensor(self.padded_tokens)
            batch["padding_mask"] = position >= kept[:, None]
            batch["loss_mask"] *= ~batch["padding_mask"]
        return batch

    def num_microbatches(self, dp: int) -> int:
        return self.num_sequences // (self.micro_batch_size * dp)

    def microbatches(self, batch: dict[str, Tensor], dp_rank: int, dp: int) -> Iterator[dict[str, Tensor]]:
        """A data-parallel rank's microbatches in order, split as Megatron's sampler does."""
        size = self.micro_batch_size
        for m in range(self.num_microbatches(dp)):
            start = (m * dp + dp_rank) * size
            yield {name: value[start : start + size] for name, value in batch.items()}


@dataclasses.dataclass
class RankResult:
    """What one rank has after a step; tensors on CPU."""

    grads: dict[str, tuple[Shard, Tensor]]  # global name → this rank's shard of the finalised gradient
    weights: dict[str, tuple[Shard, Tensor]]  # the same for weights and expert biases, after the step
    counts: dict[str, Tensor]  # router's global name → its own int64 tokens per expert before finalising
    losses: list[dict[str, Tensor]]  # the schedule's answer (last stage only)
    logged: dict[str, float]  # MTP and balance losses as Megatron would log them
    grad_norm: float | None = None


@dataclasses.dataclass
class StepResult:
    """A step of the whole model, merged over ranks and keyed by global name."""

    grads: dict[str, Tensor]
    weights: dict[str, Tensor]
    counts: dict[str, Tensor]
    lm_loss: float
    logged: dict[str, float]
    grad_norm: float | None
    ranks: list[RankResult]


def build_chunks(config: DSV3ModelConfig, problem: Problem) -> list[torch.nn.Module]:
    """This rank's model chunks by the real builder, wrapped in Megatron's DDP."""
    ddp = DistributedDataParallelConfig(**({"use_distributed_optimizer": False} | dict(problem.ddp)))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return DSV3ModelBuilder(config).build_distributed_models(groups, ddp_config=ddp)


def prepare(chunks: list[torch.nn.Module], problem: Problem) -> dict[str, Tensor]:
    """Set what the trainer sets on the config before its loop; returns the dict for each step's counts."""
    config = get_attr_wrapped_model(chunks[0], "config")
    counts: dict[str, Tensor] = {}

    def record_and_finalize(model, *args, **kwargs):
        counts.update((name, router.local_tokens_per_expert.clone()) for name, router in routers(chunks))
        finalize_model_grads(model, *args, **kwargs)

    config.finalize_model_grads_func = record_and_finalize
    if dict(problem.ddp).get("overlap_grad_reduce"):
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        if len(chunks) == 1:
            config.no_sync_func = config.no_sync_func[0]
    if problem.dtype == torch.float64:
        for chunk in chunks:
            unwrap(chunk).compute_language_model_loss = exact_cross_entropy
    return counts


def exact_cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """[B, S] losses of [B, S] labels and [S, B, V] logits in the logits' dtype (Megatron's: fp32)."""
    return F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.flatten(), reduction="none").view_as(
        labels
    )


def routers(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, DSV3Router]]:
    """(global name, router) of every MoE layer on this rank."""
    for chunk in chunks:
        names = global_names(chunk)
        for local, module in unwrap(chunk).named_modules():
            if isinstance(module, DSV3Router):
                yield names[f"{local}.weight"].name.removesuffix(".weight"), module


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Tensor, Any]:
    """As the trainer's: every stage gets the microbatch; the loss is (sum, valid tokens, report)."""
    batch = next(data_iterator)
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=batch.get("padding_mask"),
    )

    def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (losses.flatten() * batch["loss_mask"].flatten().to(losses.dtype)).sum()
        num_tokens = batch["loss_mask"].sum().to(torch.int)
        return total, num_tokens, {"lm loss": torch.stack([total.detach(), num_tokens])}

    return output, loss_func


def step(
    chunks: list[torch.nn.Module],
    problem: Problem,
    batch: dict[str, Tensor],
    forward_backward: Callable[..., list] | None = None,
) -> list[dict[str, Tensor]]:
    """Forward and backward of one global batch through a schedule; gradients are finalised."""
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    cp_group = parallel_state.get_context_parallel_group()

    def data() -> Iterator[dict[str, Tensor]]:
        for microbatch in problem.microbatches(batch, dp_rank, dp):
            yield get_batch_on_this_cp_rank(dict(microbatch), is_hybrid_cp=False, cp_group=cp_group)

    for chunk in chunks:
        chunk.zero_grad_buffer()
    return (forward_backward or get_forward_backward_func())(
        forward_step_func=forward_step,
        data_iterator=[data() for _ in chunks] if len(chunks) > 1 else data(),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=problem.num_microbatches(dp),
        seq_length=problem.seq_length,
        micro_batch_size=problem.micro_batch_size,
        forward_only=False,
    )


def log_losses(chunks: list[torch.nn.Module], problem: Problem, iteration: int = 1) -> dict[str, float]:
    """Balance and MTP loss through the calls that the trainer's log makes on every rank."""
    config = get_attr_wrapped_model(chunks[0], "config")
    scale = 1 / problem.num_microbatches(parallel_state.get_data_parallel_world_size())
    logged: dict[str, Tensor] = {}
    get_moe_metrics_tracker().report(
        loss_scale=scale,
        iteration=iteration,
        force_initialize=True,
        track_names=["seq_load_balancing_loss"],
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
        mtp_num_layers=config.mtp_num_layers,
        total_loss_dict=logged,
    )
    MTPLossLoggingHelper.track_mtp_metrics(scale, iteration, None, None, logged)
    return {name: float(value) for name, value in logged.items()}


def collect(
    chunks: list[torch.nn.Module],
    losses: list[dict[str, Tensor]],
    counts: dict[str, Tensor],
    logged: dict[str, float],
) -> RankResult:
    """This rank's part of the result, by global name."""
    grads, weights = {}, {}
    for chunk in chunks:
        names = global_names(chunk)
        for local, weight in named_weights(chunk).items():
            name, shard = names[local].name, names[local].shard
            weights[name] = (shard, weight.detach().clone())
            if hasattr(weight, "main_grad"):
                grads[name] = (shard, weight.main_grad.detach().clone())
    return RankResult(grads, weights, dict(counts), losses, logged)


def train_rank(
    rank: int,
    world_size: int,
    layout: Layout,
    problem: Problem,
    forward_backward: Callable[..., list] | None = None,
    build: Callable[[DSV3ModelConfig, Problem], list[torch.nn.Module]] = build_chunks,
) -> RankResult:
    """What each rank of `run_step` does."""
    layout.initialize()
    config = problem.config(layout)
    chunks = build(config, problem)
    counts = prepare(chunks, problem)
    losses = step(chunks, problem, problem.global_batch(config.vocab_size), forward_backward)
    return collect(chunks, losses, counts, log_losses(chunks, problem))


def join(ranks: list[RankResult]) -> StepResult:
    """Merge the ranks' parts.

    Raises:
        AssertionError: copies of a gradient or weight differ between ranks.
    """
    counts: dict[str, Tensor] = {}
    for result in ranks:
        for name, count in result.counts.items():
            counts[name] = counts.get(name, 0) + count
    sums = torch.stack([report["lm loss"].double() for r in ranks for report in r.losses]).sum(0)
    logged: dict[str, float] = {}
    for result in ranks:
        for name, value in result.logged.items():  # the last rank logs; earlier stages lack some values
            logged[name] = value
    return StepResult(
        grads=join_tensors([r.grads for r in ranks], "gradient"),
        weights=join_tensors([r.weights for r in ranks], "weight"),
        counts=counts,
        lm_loss=float(sums[0] / sums[1]),
        logged=logged,
        grad_norm=ranks[-1].grad_norm,
        ranks=ranks,
    )


def join_tensors(parts: list[dict[str, tuple[Shard, Tensor]]], what: str) -> dict[str, Tensor]:
    """Full tensors by global name from all ranks' shards; copies must be bit-equal.

    Raises:
        AssertionError: names the tensor and the ranks whose copies differ.
    """
    shards: dict[str, dict[int, tuple[Shard, Tensor, int]]] = {}
    for rank, part in enumerate(parts):
        for name, (shard, tensor) in part.items():
            first = shards.setdefault(name, {}).setdefault(shard.index, (shard, tensor, rank))
            assert torch.equal(first[1], tensor), (
                f"{what} {name}: ranks {first[2]} and {rank} differ by {(first[1] - tensor).abs().max():.3g}"
            )
    joined = {}
    for name, by_index in shards.items():
        shard = by_index[0][0]
        assert len(by_index) == shard.count, f"{what} {name}: parts {sorted(by_index)} of {shard.count}"
        joined[name] = Shard.join([by_index[i][1] for i in range(shard.count)], shard)
    return joined


def run_step(layout: Layout, problem: Problem, timeout: float = 120, **kwargs: Any) -> StepResult:
    """One step on `layout.world_size` ranks; kwargs go to `train_rank`."""
    return join(
        run_distributed(
            train_rank,
            world_size=layout.world_size,
            timeout=timeout,
            layout=layout,
            problem=problem,
            **kwargs,
        )
    )


def relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in fp64; 0 where both are zero."""
    a, b = a.double(), b.double()
    difference, size = (a - b).norm().item(), b.norm().item()
    return difference / size if size > 0 else difference


def assert_same_step(got: StepResult, expected: StepResult, tolerance: float = 1e-5) -> None:
    """Loss, every gradient, every count, the biases and the logged losses agree.

    Raises:
        AssertionError: lists the worst gradients.
    """
    assert abs(got.lm_loss / expected.lm_loss - 1) <= tolerance, (got.lm_loss, expected.lm_loss)
    assert got.grads.keys() == expected.grads.keys(), got.grads.keys() ^ expected.grads.keys()
    differences = {n: relative_difference(got.grads[n], expected.grads[n]) for n in expected.grads}
    worst = sorted(differences.items(), key=lambda item: -item[1])[:8]
    assert worst[0][1] <= tolerance, "\n".join(f"{d:.3e}  {n}" for n, d in worst)
    assert got.counts.keys() == expected.counts.keys()
    for name, count in expected.counts.items():
        assert count.dtype == torch.int64
        assert torch.equal(got.counts[name], count), (name, got.counts[name], count)
        bias = name + ".expert_bias"
        assert torch.equal(got.weights[bias], expected.weights[bias]), bias
    assert got.logged.keys() == expected.logged.keys()
    for name, value in expected.logged.items():
        assert abs(got.logged[name] / value - 1) <= max(tolerance, 1e-6), (name, got.logged[name], value)
