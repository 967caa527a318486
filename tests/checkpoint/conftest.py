"""The tokenizer of tests/sft."""

from tests.sft.conftest import tokenizer_dir  # noqa: F401 - a fixture
