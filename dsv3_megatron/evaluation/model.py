"""The harness's model: texts to token ids, and from what comes back to its results, as its own `hf` model does it."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation.answers import Answers
from dsv3_megatron.evaluation.ranks import Leader
from dsv3_megatron.evaluation.scorer import Request, Row, Score
from dsv3_megatron.evaluation.text import prefix_token

__all__ = ["HarnessModel", "generation"]

PROGRESS_S = 2.0
MAX_GEN_TOKS = 256  # where a task does not say; the harness's
KNOWN = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):
    """A model of ours, asked by the harness.

    The harness sees one process: what it asks is shared out among the ranks below it (`ranks`).

    Args:
        tokenizer: transformers'.
        leader: computes.
        answers: known already, and where new ones go.
        report: takes lines of progress.
    """

    def __init__(
        self,
        tokenizer: Any,
        leader: Leader,
        answers: Answers | None = None,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self._leader, self._answers, self._report = leader, answers or Answers(), report
        self.max_length = leader.max_length

    # --- texts and ids

    @property
    def eot_token_id(self) -> int:
        """End of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that is scored from its first token on."""
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own records."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Ids of a text; with the tokenizer's special tokens, unless it begins with them or they are not wanted."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **how)

    def _encode_prompt(self, string: str) -> list[int]:
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and string.startswith(bos)
        return self._encode(string, False if has_bos else None)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's template writes it; without the system's words where it takes none."""
        import jinja2

        def written(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return written(chat_history)
        except jinja2.exceptions.TemplateError:
            return written([message for message in chat_history if message["role"] != "system"])

    # --- log-likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See the harness.

        Raises:
            RefusedArgument: a continuation is empty, or longer than the model's context.
        """
        for request in requests:
            if request.args[1] == "":
                raise RefusedArgument(f"{_where(request)}: an empty continuation has no log-likelihood")
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        return [(score.log_prob, score.greedy) for score in self._scores(rows)]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not 0 < len(continuation) <= self.max_length:
            raise RefusedArgument(
                f"--max-length {self.max_length}: a continuation has {len(continuation)} tokens; it must have at least "
                "one and fit in the context"
            )
        # The last token is only scored: the model's input is one shorter.
        return Row(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See the harness: each token of a text once, with as much before it as there is room for."""
        of_requests = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            of_requests.append([self._row(*make_disjoint_window(window)) for window in windows])
        scores = iter(self._scores([row for rows in of_requests for row in rows]))
        return [sum(next(scores).log_prob for _ in rows) for rows in of_requests]

    def _scores(self, rows: list[Row]) -> list[Score]:
        return self._asked("score", rows, self._leader.score)

    # --- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See the harness."""
        asked: list[Request] = []
        stops: list[list[str]] = []
        seen: dict[Request, int] = {}
        for request in requests:
            question, stop = self._request(request)
            if question.temperature:  # repeats of a question are drawn anew
                number = seen[question] = seen.get(question, -1) + 1
                question = Request(**{**vars(question), "number": number})
            asked.append(question)
            stops.append(stop)
        answers = self._asked("generate", asked, self._leader.generate)
        return [self._text(tokens, stop) for tokens, stop in zip(answers, stops, strict=True)]

    def _request(self, request: Any) -> tuple[Request, list[str]]:
        context, given = request.args
        how = generation(given, _where(request), self.max_length, self._leader.samples)
        max_new_tokens, temperature = how["max_gen_toks"], how["temperature"]
        tokens = self._encode_prompt(context)[-(self.max_length - max_new_tokens) :]
        if not tokens:
            tokens = [self.prefix_token_id]
        stop = [text for text in how["until"] if text]
        if self.eot_token_id is not None:
            end = self.tokenizer.decode(self.eot_token_id)
            stop += [end] * (bool(end) and end not in stop)
        question = Request(
            tokens=tuple(tokens),
            max_new_tokens=max_new_tokens,
            stop=tuple(stop),
            temperature=temperature,
            top_k=int(how.get("top_k") or 0) if temperature else 0,
            top_p=float(how.get("top_p") or 1.0) if temperature else 1.0,
        )
        return question, stop

    def _text(self, tokens: list[int], stop: list[str]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for end in stop:
            text = text.split(end)[0]
        return text

    # --- what is asked of the ranks

    def _asked(
        self, what: str, questions: list[Any], compute: Callable[[Sequence[Any]], list[Any]]
    ) -> list[Any]:
        """Answers in the order of the questions; each is computed once, the longest first."""
        new = [question for question in dict.fromkeys(questions) if question not in self._answers]
        new.sort(key=lambda question: -len(question.tokens))
        begin = printed = time.monotonic()
        for start in range(0, len(new), self._leader.num_at_once):
            window = new[start : start + self._leader.num_at_once]
            self._answers.add(zip(window, compute(window), strict=True))
            done, now = start + len(window), time.monotonic()
            if now - printed >= PROGRESS_S or done == len(new):
                printed, rate = now, done / max(now - begin, 1e-9)
                self._report(
                    f"evaluate {what} {done} of {len(new)}, {rate:.1f} a second, {(len(new) - done) / rate:.0f} s left"
                )
        return [self._answers[question] for question in questions]


def generation(given: dict[str, Any], where: str, max_length: int, samples: bool) -> dict[str, Any]:
    """A task's generation_kwargs with the harness's defaults; "temperature" is 0 for greedy.

    Args:
        where: what the message begins with.
        max_length: of the model's context.
        samples: whether a temperature is possible.

    Raises:
        RefusedArgument: they ask for what cannot be.
    """
    how: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
    if unknown := sorted(set(how) - KNOWN):
        raise RefusedArgument(
            f"{where}: its generation_kwargs ask for {', '.join(unknown)}, which the engine has not; it has "
            f"{', '.join(sorted(KNOWN))}"
        )
    how["temperature"] = float(how.get("temperature") or 0.0) if how["do_sample"] else 0.0
    if how["temperature"] and not samples:
        raise RefusedArgument(
            f"{where}: it samples (temperature {how['temperature']}), which is not possible during training; use "
            "dsv3 evaluate on a checkpoint"
        )
    if how["max_gen_toks"] >= max_length:
        raise RefusedArgument(
            f"{where}: it generates up to {how['max_gen_toks']} tokens, which leaves no room for a prompt in the "
            f"context of {max_length}"
        )
    return how


def _where(request: Any) -> str:
    return f"task {request.task_name}, document {request.doc_id}"
