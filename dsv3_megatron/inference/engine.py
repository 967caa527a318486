"""`Engine`: generate tokens and score them with a model of `--spec dsv3`, in Megatron's dynamic engine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.config import InferenceConfig, PrefixCachingEvictionPolicy
from megatron.core.inference.inference_request import DynamicInferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.inference.context import PAGE_SIZE, LatentContext
from dsv3_megatron.inference.controller import LatentController
from dsv3_megatron.inference.redundancy import Redundancy
from dsv3_megatron.inference.sampling import request_seed
from dsv3_megatron.inference.scheduler import LatentEngine, RequestParams
from dsv3_megatron.inference.settings import BY_DEFAULT, EngineSettings, Generation, Sampling, Statistics
from dsv3_megatron.inference.two_batches import TwoBatches
from dsv3_megatron.specs.deployment import deployment_of
from dsv3_megatron.specs.names import unwrap

__all__ = ["Engine", "EngineSettings", "Generation", "Sampling", "Statistics", "cache_bytes_per_token"]


def cache_bytes_per_token(config: Any) -> int:
    """Bytes that a token takes in the cache of the whole model: layers × (kv_lora_rank + rope) × itemsize."""
    width = config.kv_lora_rank + config.qk_pos_emb_head_dim
    return config.num_layers * width * config.params_dtype.itemsize


class Engine:
    """Megatron's engine over one model, on every rank of it.

    All ranks of a model-parallel group make the same calls. Data-parallel ranks may bring different prompts, also
    none, but take part in each call. The model's weights are used where they are, so a trainer may change them
    between calls (then `refresh`).

    Args:
        model: GPTModel built from our specs, wrapped or not, on this rank; with pipeline parallelism its stage.
        settings: sizes.
        ends: token ids that end a request.
        decode: token ids to text; for stop strings.
        engine_class, tokenizer: what Megatron's server needs instead of the usual ones.

    Raises:
        RefusedArgument: the model cannot be served so; the text names the option.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: EngineSettings,
        ends: Iterable[int] = (),
        decode: Callable[[list[int]], str] | None = None,
        engine_class: type[LatentEngine] = LatentEngine,
        tokenizer: Any = None,
    ):
        self.model = unwrap(model)
        self.settings = settings
        self.ends = tuple(ends)
        self._decode = decode
        self._next_number = 0
        self._depth = 0  # of nested `active`
        self._steps = 0
        self._two_batches: TwoBatches | None = None
        self.redundancy = Redundancy(self.model, settings.num_nodes)
        self._check()
        with self.active():
            self._build(engine_class, tokenizer or _NoTokenizer())

    def _check(self) -> None:
        config, settings = self.model.config, self.settings
        if config.fp8:
            raise RefusedArgument(f"--fp8-format {config.fp8}: inference runs in --dtype bf16 or fp32")
        if settings.speculative and not config.mtp_num_layers:
            raise RefusedArgument("--speculative mtp: the model has no MTP layer; leave it out")
        tp_size = self.model.pg_collection.tp.size()
        if settings.max_batch % tp_size:
            raise RefusedArgument(
                f"--max-batch {settings.max_batch}: must be a multiple of --tensor-model-parallel-size {tp_size}"
            )
        if config.context_parallel_size > 1:
            raise RefusedArgument(
                f"--context-parallel-size {config.context_parallel_size}: inference has none; use 1"
            )

    def _build(self, engine_class: type[LatentEngine], tokenizer: Any) -> None:
        settings, config = self.settings, self.model.config
        # Of Megatron's dispatchers for its own inference layers, which ours are not; the default is allocated even so.
        config.inference_moe_token_dispatcher_type = "nccl"
        tokens_per_request = 2 if settings.speculative else 1
        # Megatron pads a step to its round sizes without looking at the limit.
        max_tokens = LatentContext.round_up_tokens(
            max(settings.max_step_tokens, settings.max_batch * tokens_per_request)
        )
        self.context = LatentContext(
            config,
            InferenceConfig(
                block_size_tokens=PAGE_SIZE,
                buffer_size_gb=self._main_cache_bytes() / 1024**3,  # type: ignore[arg-type]
                max_requests=settings.max_batch,
                max_tokens=max_tokens,
                max_sequence_length=settings.max_length,
                enable_chunked_prefill=True,
                num_speculative_tokens=tokens_per_request - 1,
                enable_prefix_caching=settings.prefix_caching,
                prefix_caching_eviction_policy=PrefixCachingEvictionPolicy.LRU,
                materialize_only_last_token_logits=False,  # decided step by step
                pg_collection=self.model.pg_collection,
                offset_sampling_seed_by_dp_rank=False,
            ),
            num_draft_layers=self._num_draft_layers(),
        )
        wrapper = GPTInferenceWrapper(self.model, self.context)
        controller = LatentController(wrapper, tokenizer)
        self.engine = engine_class(controller, self.context, self._decode)
        if deployment_of(config).microbatches == 2:
            self._two_batches = TwoBatches(self.model.decoder, self.context)

    def _num_draft_layers(self) -> int:
        return int(self.settings.speculative and self.model.post_process)

    def _main_cache_bytes(self) -> int:
        """Bytes for the main model's layers on this rank, the share of the drafting layer left to that."""
        config, settings = self.model.config, self.settings
        layers = len(self.model.decoder.layers)
        width = (config.kv_lora_rank + config.qk_pos_emb_head_dim) * config.params_dtype.itemsize
        if settings.cache_bytes is not None:
            return settings.cache_bytes * layers // (layers + self._num_draft_layers())
        pages = -(-settings.max_length // PAGE_SIZE) + 1  # a decoding request may hold one page ahead
        spare = 2  # Megatron's dummy page, and rounding
        return (settings.max_batch * pages + spare) * PAGE_SIZE * width * layers

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model as inference wants it, for the time of a call; a trainer finds it as it was."""
        if self._depth:
            yield
            return
        modes = [module for module in self.model.modules() if module.training]
        for module in modes:
            module.training = False
        InferenceMode.set_active()
        self._depth += 1
        overlapped = nullcontext() if self._two_batches is None else self._two_batches.installed()
        try:
            with overlapped:
                yield
        finally:
            self._depth -= 1
            InferenceMode.unset_active()
            for module in modes:
                module.training = True

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling = BY_DEFAULT,
        seed: int | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> int:
        """Hand in a request, which `step` works on; its number.

        Args:
            seed: of its random numbers; by default `request_seed(sampling.seed, 0)`.
            on_tokens: called with new tokens after each step that has some.

        Raises:
            RefusedArgument: the prompt is empty or too long, or the sampling is impossible.
        """
        sampling.check()
        self._check_prompt(prompt, 1)
        if sampling.stop and self._decode is None:
            raise RefusedArgument(f"--stop {sampling.stop[0]}: needs a tokenizer, and the engine has none")
        seed = request_seed(sampling.seed, 0) if seed is None else seed
        return self._submit(prompt, self._params(sampling, seed), on_tokens)

    def _submit(
        self, tokens: Sequence[int], params: RequestParams, on_tokens: Callable[[list[int]], None] | None
    ) -> int:
        self._check_room(len(tokens) + params.num_tokens_to_generate)
        number, self._next_number = self._next_number, self._next_number + 1
        self.engine.add_request(number, list(tokens), params, on_tokens)
        return number

    def abort(self, number: int) -> None:
        """End a request; a later `step` returns what it has. Nothing happens where it is done already."""
        self.engine.abort(number)

    @property
    def next_number(self) -> int:
        """Of the request that is handed in next; those of one `generate` are numbered on from it."""
        return self._next_number

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to return on this rank."""
        return self.engine.has_unfinished_requests() or bool(self.engine.done)

    def step(self) -> list[tuple[int, Generation]]:
        """One forward pass with what fits into it; the requests that are done with it.

        With expert parallelism all ranks step together: one without requests takes its part in the others' collectives.
        """
        with self.active():
            if self.engine.has_unfinished_requests():
                self.engine.step_modern()
            elif self.model.config.expert_model_parallel_size > 1:
                self.engine.controller.dummy_forward()
            self._steps += 1
            if self.settings.rebalance_interval and self._steps % self.settings.rebalance_interval == 0:
                self.redundancy.rebalance()
        return [
            (request.request_id, self._generation(request, reason, choices))
            for request, reason, choices in self.engine.take_done()
        ]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] = BY_DEFAULT,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        on_finish: Callable[[int, Generation], None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Generate an answer to each prompt; no other requests may be unfinished.

        Args:
            prompts: token ids, one request each.
            sampling: of all, or of each.
            on_tokens: called with a prompt's number and its new tokens after each step that has some.
            on_finish: called with a prompt's number and its result when it is done.
            seeds: of each request; by default `request_seed(sampling.seed, its number)`.

        Returns:
            Results in the order of the prompts.

        Raises:
            RefusedArgument: see `submit`.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        numbers = []
        for index, (prompt, how) in enumerate(zip(prompts, each, strict=True)):
            seed = request_seed(how.seed, index) if seeds is None else seeds[index]
            tell = None if on_tokens is None else _with_index(on_tokens, index)
            numbers.append(self.submit(prompt, how, seed, tell))
        return self._finish(numbers, on_finish)

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """log p(token | all before it) of every token but the first, fp32 [length − 1] each, by the engine's own pass.

        Raises:
            RefusedArgument: a sequence is empty, or longer than `settings.max_length`.
        """
        return [log_probs for log_probs, _ in self.score(sequences)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """`log_probs`, and whether each of these tokens is the most likely one there: bool [length − 1]."""
        numbers = []
        for tokens in sequences:
            self._check_prompt(tokens, 0)
            params = RequestParams(num_tokens_to_generate=0, top_k=1, return_log_probs=True)
            numbers.append(self._submit(tokens, params, None))
        return [
            (
                torch.tensor(result.prompt_log_probs),
                torch.tensor(result.prompt_first_choices, dtype=torch.bool),
            )
            for result in self._finish(numbers, None)
        ]

    def _finish(
        self, numbers: list[int], on_finish: Callable[[int, Generation], None] | None
    ) -> list[Generation]:
        """Step until these requests are done, and those of every rank that shares this one's experts."""
        places = {number: place for place, number in enumerate(numbers)}
        results: dict[int, Generation] = {}
        with self.active():
            while self._any_rank(self.busy):
                for number, generation in self.step():
                    place = places[number]
                    results[place] = generation
                    if on_finish is not None:
                        on_finish(place, generation)
        return [results[place] for place in range(len(numbers))]

    @property
    def statistics(self) -> Statistics:
        """Drafts verified and accepted since the engine was built."""
        counts = (self.engine._spec_tokens_proposed_per_pos, self.engine._spec_tokens_accepted_per_pos)
        proposed, accepted = (int(count.sum()) for count in counts)
        return Statistics(proposed, accepted)

    def refresh(self) -> None:
        """The weights have changed: forget what was computed with the old ones."""
        self.context.reset()

    def close(self) -> None:
        """Give the cache back; the model stays."""
        from megatron.core.inference import utils

        # Megatron remembers the first model's MoE layers for the life of the process.
        utils.moe_layer_cache, utils._moe_metadata_sync_initialized = None, False
        if self._two_batches is not None:
            self._two_batches.close()
        del self.engine, self.context

    def _check_prompt(self, tokens: Sequence[int], room: int) -> None:
        if not tokens:
            raise RefusedArgument("the prompt is empty: give at least one token")
        if len(tokens) + room > self.settings.max_length:
            raise RefusedArgument(
                f"--max-length {self.settings.max_length}: a prompt of {len(tokens)} tokens leaves no room"
            )

    def _check_room(self, num_tokens: int) -> None:
        """A request that can never fit in the cache would be dropped by Megatron."""
        pages = self.context.kv_block_allocator.total_count - 1
        if -(-min(num_tokens, self.settings.max_length) // PAGE_SIZE) > pages:
            raise RefusedArgument(
                f"--cache-gb: {pages} pages of {PAGE_SIZE} tokens hold no request of {num_tokens}; give more, or "
                "a smaller --max-length or --max-new-tokens"
            )

    def _params(self, how: Sampling, seed: int) -> RequestParams:
        return RequestParams.sampled(
            how.temperature,
            how.top_k,
            how.top_p,
            num_tokens_to_generate=how.max_new_tokens,
            return_log_probs=how.log_probs,
            skip_prompt_log_probs=True,
            seed=seed,
            ends=() if how.ignore_ends else self.ends,
            stop=how.stop,
        )

    def _any_rank(self, unfinished: bool) -> bool:
        if self.model.config.expert_model_parallel_size == 1:
            return unfinished
        flag = torch.tensor([int(unfinished)], device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @staticmethod
    def _generation(request: DynamicInferenceRequest, reason: str, choices: list[bool]) -> Generation:
        if request.status == Status.FAILED:
            raise RuntimeError(f"request {request.request_id} failed: {[str(e) for e in request.events]}")
        params = request.sampling_params
        return Generation(
            tokens=list(request.generated_tokens),
            finish_reason=reason,
            log_probs=request.generated_log_probs if params.return_log_probs else None,
            prompt_log_probs=request.prompt_log_probs or [],
            prompt_first_choices=choices[: len(request.prompt_log_probs or [])],
            routing=request.routing_indices,
        )


def _with_index(function: Callable[[int, list[int]], None], index: int) -> Callable[[list[int]], None]:
    return lambda tokens: function(index, tokens)


class _NoTokenizer:
    """Requests come as ids and leave as ids; text is made of them elsewhere."""

    eod = -1
    bos = None

    def tokenize(self, text: str) -> list[int]:
        raise RefusedArgument("the engine takes token ids, not text")

    def detokenize(self, tokens: Sequence[int], **unused: Any) -> str:
        return ""
