"""Megatron's controller of a generation step, with a draft that sees the whole context."""

from typing import Any

import torch
from megatron.core.inference.communication_utils import broadcast_from_last_pipeline_stage
from megatron.core.inference.text_generation_controllers import mtp_utils_pytorch
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from dsv3_megatron.inference.context import LatentContext
from dsv3_megatron.inference.sampling import KeyedSampling

__all__ = ["LatentController"]


class LatentController(TextGenerationController):
    """What differs from Megatron's controller: random numbers by request, the draft, all logits only where asked for.

    The draft. MTP layer k = 1 at position i takes the main model's hidden state there and token i + 1, and predicts
    token i + 2. Megatron runs it at the last verified position alone, where it attends to nothing before. Here it
    runs over all tokens of the step, with pages of its own: after a prompt the whole prompt is in them, and after each
    verified token that token. A rejected draft leaves its page entry behind where the next step writes. Verification
    stays Megatron's: what is emitted is always the main model's own sample.
    """

    def _init_dynamic_sampling_tensors(self) -> None:
        super()._init_dynamic_sampling_tensors()
        self._sampling = KeyedSampling(self.sampling_rng, self.vocab_size)
        self._materializes_all_logits = not self._context.config.materialize_only_last_token_logits

    @property
    def _context(self) -> LatentContext:
        return self.inference_wrapped_model.inference_context

    def _dynamic_step_context_init(self, *args: Any, **options: Any) -> Any:
        prepared = super()._dynamic_step_context_init(*args, **options)
        if self._materializes_all_logits:
            # Log-probabilities of a prompt need the logits of all its tokens; no other step pays for them.
            self._context.config.materialize_only_last_token_logits = not self._prompt_log_probs_wanted()
        return prepared

    def _prompt_log_probs_wanted(self) -> bool:
        context = self._context
        active = context.total_request_count - context.paused_request_count
        if context.num_decode_requests == active:
            return False
        prefill = slice(context.num_decode_requests, active)
        wanted = context.active_request_metadata
        return bool((wanted["return_log_probs"][prefill] & ~wanted["skip_prompt_log_probs"][prefill]).any())

    def _dynamic_step_calculate_log_probs(self) -> tuple[list[list[float]], Tensor]:
        """Megatron's, and for prompts whose log-probabilities are wanted: is each token the model's first choice?"""
        context = self._context
        of_requests, table = super()._dynamic_step_calculate_log_probs()
        if not context.config.materialize_only_last_token_logits:
            best = iter(table.amax(dim=-1).tolist())
            for request, own in zip(
                context.request_ids[context.active_slice].tolist(), of_requests, strict=True
            ):
                choices = [log_prob >= next(best) for log_prob in own]
                context.first_choices.setdefault(request, []).extend(choices)
        return of_requests, table

    # Sampling and verification

    def _dynamic_step_sample_logits(self) -> None:
        super()._dynamic_step_sample_logits()
        self._put_following_prompt_token()

    def _dynamic_step_sample_logits_and_verify_tokens(
        self, input_ids: Tensor, token_row_indices: Tensor | None = None
    ) -> None:
        super()._dynamic_step_sample_logits_and_verify_tokens(input_ids, token_row_indices)
        self._put_following_prompt_token()

    def _put_following_prompt_token(self) -> None:
        """After a chunk of a prompt comes the prompt's next token, not a sample: for log-probability and draft."""
        context = self._context
        if not context.following_prompt_tokens:
            return
        for row, request in enumerate(context.request_ids[context.active_slice].tolist()):
            token = context.following_prompt_tokens.get(request)
            if token is not None:
                self._sampled_tokens_cuda[row] = token

    def _verify_speculative_tokens(
        self,
        output_tokens: Tensor,
        input_tokens_required: Tensor,
        num_decode_requests: int,
        num_prefill_requests: int,
        active_request_count: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Megatron's verification; a draft that would end its request is left to be the sample.

        Megatron looks for the end of a request at the sampled token alone, and would generate past an accepted one.
        """
        given = input_tokens_required.reshape(-1)
        ends = self._context.active_request_metadata["termination_id"][:num_decode_requests]
        shape = (num_decode_requests, self._tokens_per_request)
        drafts = given[: shape[0] * shape[1]].view(shape).clone()
        is_end = drafts[:, 1:] == ends.to(drafts.device)[:, None]
        compared = given.clone()
        drafts[:, 1:][is_end] = -1  # no token: not accepted
        compared[: drafts.numel()] = drafts.flatten()
        if given.is_cuda:
            verify = super()._verify_speculative_tokens
            last, accepted, _ = verify(
                output_tokens, compared, num_decode_requests, num_prefill_requests, active_request_count
            )
        else:  # Megatron's kernel is Triton's; this is its twin in torch
            last, accepted, _ = mtp_utils_pytorch.verify_speculative_tokens(
                compared,
                output_tokens,
                num_decode_requests,
                num_prefill_requests,
                self.num_speculative_tokens,
            )
        return last, accepted, given

    def _prepare_speculative_tokens_for_next_forward_pass(
        self,
        num_decode_requests: int,
        output_tokens: Tensor,
        required_logit_indices: Tensor,
        last_one_indices: Tensor,
        accepted_tokens_mask: Tensor,
        input_tokens_required: Tensor,
    ) -> None:
        if output_tokens.is_cuda:
            super()._prepare_speculative_tokens_for_next_forward_pass(
                num_decode_requests,
                output_tokens,
                required_logit_indices,
                last_one_indices,
                accepted_tokens_mask,
                input_tokens_required,
            )
            return
        count = last_one_indices.numel()
        self._sampled_tokens_cuda[:count] = output_tokens[last_one_indices]
        self._last_accepted_seq_indices = self._last_accepted_seq_indices_buf[:count]
        self._last_accepted_seq_indices.copy_(required_logit_indices[last_one_indices])
        shape = (num_decode_requests, self._tokens_per_request)
        mask = accepted_tokens_mask[: shape[0] * shape[1]].view(shape)[:, 1:]
        tokens = input_tokens_required[: shape[0] * shape[1]].view(shape)[:, 1:]
        self._accepted_tokens_per_request[:num_decode_requests] = torch.where(mask, tokens, -1)
        self._accepted_token_counts_per_request[:num_decode_requests] = mask.sum(dim=1)

    @property
    def _tokens_per_request(self) -> int:
        """Tokens of a decoding request in a step: the last sample and its drafts."""
        return self.num_speculative_tokens + 1

    # The draft

    def _compute_serial_mtp_and_sample(self, base_position: Tensor | None = None) -> None:
        context = self._context
        count = context.total_request_count - context.paused_request_count
        logits = None
        if self._is_last_pp_stage:
            logits = self._draft_logits(self._last_accepted_seq_indices, self._sampled_tokens_cuda[:count])
        if self.model_is_pipeline_parallel:
            logits = self._broadcast(logits, count)
        assert logits is not None
        lengths = context.request_kv_length_offsets + context.request_query_lengths  # verified tokens
        drafts = self._sampling.sample_at(
            logits, context, torch.arange(count), lengths[context.active_slice].long() + 1
        )
        self._sampled_mtp_tokens_cuda[0, :count] = drafts

    def _draft_logits(self, last: Tensor, sampled: Tensor) -> Tensor:
        """The MTP layer's logits [requests, vocabulary] of the token after `sampled`, which follows token `last`.

        Runs the layer on every token of the step, so that its pages are complete.
        """
        context, model = self._context, self._unwrapped_model
        input_ids, position_ids = context.current_input_and_position_ids()
        following = input_ids.roll(-1, dims=1)
        following[0, last] = sampled
        layer = model.mtp.layers[0]
        with context.drafting(0):
            hidden = layer._proj_and_transformer_layer(
                hidden_states=context.mtp_decoder_hidden_states,
                decoder_input=model.embedding(input_ids=following, position_ids=position_ids),
                inference_params=context,
            )
        context.mtp_decoder_hidden_states = None
        head = model.output_layer
        if self._sp_enabled:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.inference_wrapped_model.tp_group)
        sequence_parallel, head.sequence_parallel = head.sequence_parallel, False
        try:
            logits, _ = head(hidden[last], weight=None, runtime_gather_output=True)
        finally:
            head.sequence_parallel = sequence_parallel
        return logits.squeeze(1)

    def _broadcast(self, logits: Tensor | None, count: int) -> Tensor:
        return broadcast_from_last_pipeline_stage(
            [count, self.vocab_size],
            dtype=self.model_config.params_dtype,
            tensor=logits,
            pp_group=self.pp_group,
        )

    def _run_dummy_serial_mtp_forward(self) -> None:
        """Part of a rank without requests in the draft of its expert-parallel peers: collectives, nothing kept."""
        if not self.num_speculative_tokens:
            return
        logits = None
        if self._is_last_pp_stage:
            first = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
            logits = self._draft_logits(first, first)
        if self.model_is_pipeline_parallel:
            self._broadcast(logits, 1)
