"""`dsv3 serve` as a process: answers, streams, log-probabilities, refusals, back-pressure, an orderly end."""

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.serve.server import main
from dsv3_megatron.serve.source import open_source
from dsv3_megatron.studies.ports import free_port
from tests.inference.models import full_log_probs, opened, transformers_greedy

PATIENCE_S = 240.0


class Running:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *more: str):
        self.port = free_port()
        words = [
            "--hf",
            str(folder),
            "--device",
            "cpu",
            "--port",
            str(self.port),
            "--model-name",
            "demo",
            *more,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv3_megatron", "serve", *words], stderr=subprocess.PIPE, text=True
        )
        begin = time.monotonic()
        while time.monotonic() - begin < PATIENCE_S and self.process.poll() is None:
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.2)
        self.process.kill()
        raise AssertionError(self.process.communicate()[1])

    def get(self, path: str) -> tuple[int, Any]:
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self._ask("POST", path, body if isinstance(body, str) else json.dumps(body))

    def _ask(self, method: str, path: str, body: str | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def stream(self, path: str, body: dict) -> list[dict]:
        """The events up to [DONE]."""
        connection = self.begin(path, body)
        lines = [line for line in connection.getresponse().read().decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def begin(self, path: str, body: dict) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        return connection

    def idle(self) -> bool:
        """Whether no request is under way, within a while."""
        for _ in range(200):
            if self.get("/health")[1]["requests"] == 0:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture(scope="module")
def server(hf):
    running = Running(hf, "--max-requests", "8", "--max-batch", "4", "--speculative", "mtp")
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0
    running.process.communicate()


@pytest.fixture(scope="module")
def source(hf):
    return open_source(None, hf)


PROMPT = "def add(first, second"
BODY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def test_completions_are_those_of_transformers(server, source, hf):
    prompt = source.tokenizer.encode(PROMPT)
    (wanted,), _ = transformers_greedy(hf, [prompt], 12)
    status, answer = server.post("/v1/completions", BODY)
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "demo"
    (choice,) = answer["choices"]
    assert choice["text"] == source.tokenizer.decode(wanted) and choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12,
    }  # fmt: skip
    events = server.stream("/v1/completions", BODY)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert len(events) > 3 and events[-1]["choices"][0]["finish_reason"] == "length"
    stop = choice["text"][3:5]
    _, stopped = server.post("/v1/completions", {**BODY, "stop": stop})
    assert stopped["choices"][0]["text"] == choice["text"][: choice["text"].index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_log_probs_and_echo_are_the_trainers(server, source, hf):
    """`echo` with `logprobs`, for which Megatron's engine would have died."""
    prompt = source.tokenizer.encode(PROMPT)
    status, answer = server.post("/v1/completions", {**BODY, "prompt": prompt, "logprobs": 2, "echo": True})
    assert status == 200
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    (wanted,), _ = transformers_greedy(hf, [prompt], 12)
    with opened(hf) as model:
        expected = full_log_probs(model, prompt + wanted).tolist()
    assert found[0] is None and found[1:] == pytest.approx(expected, abs=1e-5)
    tops = answer["choices"][0]["logprobs"]["top_logprobs"][1:]
    assert all(max(top.values()) >= value - 1e-6 for top, value in zip(tops, found[1:], strict=True))


def test_a_stream_counts_text_offsets_on(server):
    body = {**BODY, "logprobs": 1}
    (whole,) = server.post("/v1/completions", body)[1]["choices"]
    events = server.stream("/v1/completions", body)
    offsets = [place for event in events for place in event["choices"][0]["logprobs"]["text_offset"]]
    assert len(events) > 3 and offsets == whole["logprobs"]["text_offset"]


def test_chat(server, source, hf):
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Name the function."},
    ]
    (wanted,), _ = transformers_greedy(hf, [source.tokenizer.chat(messages)], 10)
    body = {"messages": messages, "max_tokens": 10, "temperature": 0, "ignore_eos": True}
    status, answer = server.post("/v1/chat/completions", body)
    text = source.tokenizer.decode(wanted)
    assert status == 200 and answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    events = server.stream("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]) == text
    assert events[-1]["usage"]["completion_tokens"] == 10


def test_sampled_choices_have_seeds(server):
    body = {**BODY, "temperature": 1.0, "seed": 3, "n": 3}
    first, again = (
        [choice["text"] for choice in server.post("/v1/completions", body)[1]["choices"]] for _ in range(2)
    )
    assert first == again and len(set(first)) == 3
    other = server.post("/v1/completions", {**body, "seed": 4})[1]["choices"]
    assert [choice["text"] for choice in other] != first


def test_models_and_wrong_addresses(server):
    assert server.get("/v1/models")[1]["data"][0]["id"] == "demo"
    assert server.get("/v1/models/demo")[1]["max_model_len"] == 128
    for method, path, status in (
        (server.get, "/v1/models/other", 404), (server.get, "/v1/nothing", 404), (server.get, "/v1/completions", 405),
    ):  # fmt: skip
        found, body = method(path)
        assert found == status and body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/v1/completions", "{", 400, "not JSON"),
        ("/v1/completions", "[" * 100_000, 400, "not JSON"),
        ("/v1/completions", {"prompt": "\ud800"}, 400, "not JSON"),
        ("/v1/completions", {"prompt": "x", "stop": "\ud800"}, 400, "not JSON"),
        ("/v1/completions", {"prompt": "x", "temprature": 1}, 400, "temprature"),
        ("/v1/completions", {"prompt": "x" * 500}, 400, "maximum context length"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "other"),
        ("/v1/completions", {"prompt": "x", "n": 9}, 400, "9 answers"),
        ("/v1/chat/completions", {"messages": []}, 400, "no messages"),
    ],
)
def test_bad_requests_are_refused_and_harm_no_one(server, path, body, status, named):
    found, answer = server.post(path, body)
    assert found == status and named in answer["error"]["message"]
    assert server.post("/v1/completions", BODY)[0] == 200


@pytest.mark.parametrize(
    "extreme", [{"top_k": 2**40}, {"top_k": 10**30}, {"top_p": 1e-300}, {"temperature": 1e-300}]
)
def test_extreme_sampling_harms_no_one(server, extreme):
    assert server.post("/v1/completions", {**BODY, "temperature": 1, **extreme})[0] == 200
    assert server.post("/v1/completions", BODY)[0] == 200


def test_more_than_it_lets_in_is_pushed_back(server):
    """While eight long answers are under way the ninth gets 429; the eight are answered; then there is room."""
    results: list[int] = []
    long = {**BODY, "max_tokens": 110, "prompt": "d"}

    def ask() -> None:
        results.append(server.post("/v1/completions", long)[0])

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {200, 429} and results.count(200) >= 8
    assert server.idle() and server.post("/v1/completions", BODY)[0] == 200


def test_who_hangs_up_is_not_answered_further(server):
    connection = server.begin("/v1/completions", {**BODY, "max_tokens": 120, "prompt": "d", "n": 8})
    response = connection.getresponse()
    assert response.read(20)
    assert server.get("/health")[1]["requests"] == 8
    response.close()
    connection.close()
    assert server.idle()


@pytest.mark.slow
def test_the_end_waits_for_answers_under_way(hf):
    running = Running(hf)
    connection = running.begin("/v1/completions", {**BODY, "max_tokens": 100, "prompt": "d"})
    response = connection.getresponse()
    first = response.read(10)
    running.process.send_signal(signal.SIGTERM)
    text = (first + response.read()).decode()
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in text
    assert running.process.wait(60) == 0
    assert "closing: 1 answers" in running.process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("grace", ["0", "600"])
def test_what_is_over_the_grace_is_cut(hf, grace):
    """With no grace at once, with a long one at the second signal."""
    running = Running(hf, "--grace-seconds", grace)
    connection = running.begin("/v1/completions", {**BODY, "max_tokens": 120, "prompt": "d", "n": 64})
    response = connection.getresponse()
    first = response.read(10)
    running.process.send_signal(signal.SIGTERM)
    if grace != "0":
        time.sleep(0.1)  # two pending signals are one
        running.process.send_signal(signal.SIGTERM)
    text = (first + response.read()).decode()
    assert "the server has closed" in text and text.endswith("data: [DONE]\n\n")
    assert running.process.wait(60) == 0
    assert "answers are cut short" in running.process.communicate()[1]


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_a_grace_that_is_no_time_is_refused_before_anything_is_loaded(hf, seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--hf", str(hf), "--device", "cpu", "--grace-seconds", seconds])
    assert ended.value.code == 2 and f"error: --grace-seconds {float(seconds)}" in capsys.readouterr().err


@pytest.mark.slow
def test_an_address_that_is_taken_is_one_line(hf, server):
    words = ["--hf", str(hf), "--device", "cpu", "--port", str(server.port)]
    ran = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron", "serve", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith(f"error: --host 127.0.0.1 --port {server.port}: ")
