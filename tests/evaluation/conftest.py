"""A small model with a tokenizer and a context that the shipped tasks fit in, in both formats."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.data.vocabulary import EOS, save_tokenizer, train_tokenizer
from dsv3_megatron.evaluation.documents import choices, written
from tests.inference.models import write_model

VOCABULARY = 400
CONTEXT = 256


def write_folder(folder: Path) -> Path:
    text = [row["text"] for language in ("en", "zh") for row in written(language)]
    text += [f"{row['question']} {row['choices']}" for row in choices("en")]
    write_model(folder, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    tokenizer = train_tokenizer(text, VOCABULARY)
    save_tokenizer(tokenizer, folder)
    end = {"eos_token_id": tokenizer.token_to_id(EOS)}
    (folder / "generation_config.json").write_text(json.dumps(end))
    return folder


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    hf_to_megatron(hf, folder)
    return folder


@pytest.fixture
def endpoint():
    """A chat API that replies with the letter in its text, `…letter X…`, or else with A; what it was sent."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            _, _, named = body["messages"][0]["content"].partition("letter ")
            letter = named[:1] or "A"
            reply = json.dumps({"choices": [{"message": {"content": f" {letter}."}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *unused: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()
