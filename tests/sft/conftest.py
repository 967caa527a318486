"""A small tokenizer with the chat tokens."""

from pathlib import Path

import pytest

from dsv3_megatron.data.vocabulary import save_tokenizer, train_tokenizer

TEXT = [
    "def add(first, second):\n    return first + second\n",
    "Name the function. You write Python. Yes, no.",
] * 20


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXT, 300), folder)
    return folder
