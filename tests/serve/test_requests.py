"""Bodies of the API: what is understood, and what is refused with which reason. No engine."""

import pytest

from dsv3_megatron.inference.server.requests import BadRequest, Limits, chat_request, completion_request
from dsv3_megatron.serve.tokenizer import Tokenizer

LIMITS = Limits("demo", 128, 300)


def encode(text):
    return list(text.encode())


def test_a_prompt_in_each_of_its_forms():
    for given, wanted in (
        ("ab", [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ):
        assert completion_request({"prompt": given}, LIMITS, encode).prompts == wanted


def test_what_is_left_out():
    asked = completion_request({"prompt": "a", "model": "demo", "user": "x"}, LIMITS, encode)
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.n, asked.stop) == (16, 1.0, 1.0, 1, ())
    assert asked.top_logprobs is None and not asked.stream and not asked.echo
    again = completion_request({"prompt": "a"}, LIMITS, encode)
    assert asked.seed != again.seed  # drawn anew
    assert completion_request({"prompt": "a", "seed": 5}, LIMITS, encode).seed == 5


BAD = [
    ({}, "prompt must be", 400),
    ({"prompt": ""}, "empty", 400),
    ({"prompt": []}, "prompt must be", 400),
    ({"prompt": [1, "x"]}, "prompt must be", 400),
    ({"prompt": [300]}, "token 300", 400),
    ({"prompt": [True]}, "prompt must be", 400),
    ({"prompt": "x" * 128}, "maximum context length is 128", 400),
    ({"prompt": "x", "max_tokens": 128}, "maximum context length", 400),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", 400),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens='5'", 400),
    ({"prompt": "x", "temperature": -1}, "temperature=-1", 400),
    ({"prompt": "x", "temperature": 3}, "temperature=3", 400),
    ({"prompt": "x", "temperature": float("nan")}, "temperature=nan", 400),
    ({"prompt": "x", "temperature": True}, "temperature=True", 400),
    ({"prompt": "x", "top_p": 0}, "top_p=0", 400),
    ({"prompt": "x", "top_k": -1}, "top_k=-1", 400),
    ({"prompt": "x", "n": 0}, "n=0", 400),
    ({"prompt": "x", "n": 129}, "n=129", 400),
    ({"prompt": "x", "best_of": 2}, "best_of", 400),
    ({"prompt": "x", "logprobs": 21}, "logprobs=21", 400),
    ({"prompt": "x", "stop": [""]}, "stop", 400),
    ({"prompt": "x", "stop": 5}, "stop", 400),
    ({"prompt": "x", "stream": "yes"}, "stream='yes'", 400),
    ({"prompt": "x", "stream": 1}, "stream=1", 400),
    ({"prompt": "x", "echo": True, "logprobs": 1, "stream": True}, "not streamed", 400),
    ({"prompt": "x", "presence_penalty": 0.5}, "presence_penalty=0.5", 400),
    ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", 400),
    ({"prompt": "x", "stream_options": 5}, "stream_options", 400),
    ({"prompt": "x", "temprature": 1}, "unknown parameter 'temprature'", 400),
    ({"prompt": "x", "model": "another"}, "model 'another'", 404),
    ([], "JSON object", 400),
]


@pytest.mark.parametrize(("body", "named", "status"), BAD)
def test_bad_completions(body, named, status):
    with pytest.raises(BadRequest, match=named.replace("(", r"\(")) as refused:
        completion_request(body, LIMITS, encode)
    assert refused.value.status == status


def test_bad_chats(hf):
    chat = Tokenizer(hf).chat
    user = {"role": "user", "content": "x"}
    for body, named, status in (
        ({}, "messages must be a list", 400),
        ({"messages": 5}, "messages must be a list", 400),
        ({"messages": {"role": "user"}}, "messages must be a list", 400),
        ({"messages": []}, "no messages", 400),
        ({"messages": "x"}, "", 400),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "role", 400),
        ({"messages": [user, {"role": "assistant", "content": "y"}]}, "turns", 400),
        ({"messages": [user], "max_tokens": 200}, "maximum context length", 400),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "maximum context length", 400),
        ({"messages": [user], "top_logprobs": 2}, "needs logprobs", 400),
        ({"messages": [user], "prompt": "x"}, "unknown parameter 'prompt'", 400),
        ({"messages": [user], "tools": [{}]}, "tools", 400),
    ):
        with pytest.raises(BadRequest, match=named) as refused:
            chat_request(body, LIMITS, chat)
        assert refused.value.status == status, body
    with pytest.raises(BadRequest, match="no tokenizer") as refused:
        chat_request({"messages": [user]}, LIMITS, None)
    assert refused.value.status == 404


def test_a_chat_may_fill_the_context(hf):
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "de"}, {"type": "text", "text": "f"}]}
        ]
    }
    asked = chat_request(body, LIMITS, Tokenizer(hf).chat)
    assert asked.prompts == [Tokenizer(hf).chat([{"role": "user", "content": "def"}])]
    assert asked.max_tokens == 128 - len(asked.prompts[0])
