"""Byte-level BPE vocabulary with the sentinel tokens of DeepSeek-V3, in the folder format of Hugging Face.

The folder is what Megatron reads with `--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR`, without
a network.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_megatron.data.punctuation import merged_tokens

FIM_BEGIN = "<|fim_begin|>"
FIM_HOLE = "<|fim_hole|>"
FIM_END = "<|fim_end|>"
EOS = "<|eos_token|>"
# Not of the report. Megatron wants a padding token, and with EOS in that place it would mask the loss of each
# EOS.
PAD = "<|pad_token|>"
# The released tokenizer's, for conversations; text of pre-training has none of them.
BOS = "<｜begin▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (FIM_BEGIN, FIM_HOLE, FIM_END, EOS, PAD, BOS, USER, ASSISTANT)

# A conversation as the released tokenizer renders it (without tools): system text right after BOS, EOS after each
# answer. `dsv3_megatron.sft.chat` says the same in tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '"
    + ASSISTANT
    + "' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)

TOKENIZER_FILE = "tokenizer.json"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# What a token may span (report §4.1: byte-level BPE whose tokens may join punctuation and line breaks).
_PIECES = (
    r"\p{N}{1,3}",  # digits, at most three together
    r"[^\r\n\p{L}\p{N}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word, with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # punctuation, with the line breaks after it
    r"|\s*[\r\n]+"  # line breaks, with blanks before them
    r"|\s+(?!\S)|\s+",  # other blanks, the last one left to the word that follows
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` entries; the special tokens get the ids 0, 1,
    ….

    Too little text gives fewer entries. Raises ValueError when `vocab_size` cannot hold all bytes and special
    tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: "
            f"256 bytes and {len(SPECIAL_TOKENS)} special tokens need {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(piece), behavior="isolated") for piece in _PIECES]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and the files that make `folder` a Hugging Face tokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        # A data set is longer than any context: without this each document draws a warning.
        "model_max_length": 10**18,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / TOKENIZER_FILE))


class DocumentEncoder:
    """Text to ids with a saved tokenizer; special tokens written out in the text are read as ordinary
    text."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        # Else a document *about* `<|eos_token|>` (this file, say) would end there.
        self._tokenizer.encode_special_tokens = True
        ids = {token: self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self.special_ids = {token: token_id for token, token_id in ids.items() if token_id is not None}
        if missing := [token for token in SPECIAL_TOKENS if token not in self.special_ids]:
            raise ValueError(f"{folder / TOKENIZER_FILE} lacks the special tokens {', '.join(missing)}")
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    @functools.cached_property
    def merged_punctuation(self) -> dict[int, list[int]]:
        """Ids that join punctuation and line breaks, with the ids of their parts."""
        texts = {token: self.decode([token]) for token in range(self.vocab_size)}
        return merged_tokens(texts, self.encode)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, with special tokens written out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)
