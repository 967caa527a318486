"""A small model with a tokenizer and a chat template, as a Hugging Face directory and as a Megatron checkpoint."""

import json
from pathlib import Path

import pytest

from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.data.vocabulary import EOS, save_tokenizer, train_tokenizer
from tests.inference.models import write_model

TEXT = ["def add(first, second):\n    return first + second\n", "Name the function. Yes, no."] * 20
VOCABULARY = 300


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("hf"), vocab_size=VOCABULARY)
    tokenizer = train_tokenizer(TEXT, VOCABULARY)
    save_tokenizer(tokenizer, folder)
    end = {"eos_token_id": tokenizer.token_to_id(EOS)}
    (folder / "generation_config.json").write_text(json.dumps(end))
    return folder


@pytest.fixture(scope="session")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    hf_to_megatron(hf, folder)
    return folder


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without tokenizer and MTP layer."""
    return write_model(tmp_path_factory.mktemp("bare"), mtp=False)
