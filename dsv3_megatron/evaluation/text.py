"""The tokenizer as the harness's own `hf` model has it: transformers', so that both see the same ids."""

from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["open_tokenizer", "prefix_token"]


def open_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder with tokenizer.json; no network.

    Raises:
        RefusedArgument: transformers cannot open it, or it names neither a beginning nor an end token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception:
        try:  # a model type that transformers does not know says nothing about the tokenizer's file
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise RefusedArgument(
                f"the tokenizer of {folder} cannot be opened ({reason}): give --tokenizer DIR with tokenizer.json"
            ) from error
    finally:
        logging.set_verbosity(before)
    prefix_token(tokenizer)
    return tokenizer


def prefix_token(tokenizer: Any) -> int:
    """The token before a text of which all tokens are scored: beginning, or end where there is no beginning."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise RefusedArgument(
        f"{tokenizer.name_or_path}: the tokenizer names neither a beginning nor an end token (bos_token, eos_token in "
        "tokenizer_config.json); log-likelihoods need one before the text"
    )
