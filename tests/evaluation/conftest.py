"""A small model with a tokenizer and a context that the shipped tasks fit in, in both formats."""

import json
from pathlib import Path

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
