"""The small tokenizer of fine-tuning's tests."""

from tests.sft.conftest import tokenizer_dir

__all__ = ["tokenizer_dir"]
