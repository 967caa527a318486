"""Byte-level BPE vocabulary with the sentinel tokens of DeepSeek-V3, in the folder format of Hugging Face.

The folder is what Megatron reads with `--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR`, without
a network. A folder that somebody else made (the released tokenizer) is read as well: its special tokens are those that
it names, whatever they are called.
"""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_megatron.data.punctuation import merged_tokens
from dsv3_megatron.data.tokenizer_files import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TokenizerError,
    added_tokens,
    read_json,
    special_tokens,
)

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

# What a conversation with tools begins with; calls and results are text.
TOOLS_HELP = "Functions that may be called, one JSON schema per line:\n"
CALLS_HELP = (
    'A call is written as\n<tool_call>\n{"name": FUNCTION, "arguments": OBJECT}\n</tool_call>\n'
    "and its result follows between <tool_response> and </tool_response>."
)

# A conversation in the form of the released tokenizer's: system text right after BOS, EOS after each answer.
# `dsv3_megatron.sft.chat` says the same in tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set found = namespace(system='') %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set found.system = found.system + message['content'] %}{% endif %}{% endfor %}"
    "{{ found.system }}"
    "{% if tools %}{% if found.system %}{{ '\n\n' }}{% endif %}{{ "
    + repr(TOOLS_HELP)
    + " }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}{{ "
    + repr(CALLS_HELP)
    + " }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'tool' %}"
    "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '" + USER + "' }}{% endif %}"
    "{{ '<tool_response>\n' + (message['name'] + ': ' if message['name'] else '') + message['content'] }}"
    "{{ '\n</tool_response>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' }}"
    "{% set reasoning = message['reasoning_content'] or message['reasoning'] or message['thinking'] %}"
    "{% if reasoning %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) + ', \"arguments\": ' }}"
    "{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}"
    "{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)

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
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / TOKENIZER_FILE))


# A released tokenizer's names of the tokens that stand for ours.
_ROLES = {EOS: "eos_token", PAD: "pad_token", BOS: "bos_token"}
_OTHER_NAMES = {
    FIM_BEGIN: ("<｜fim▁begin｜>",),
    FIM_HOLE: ("<｜fim▁hole｜>",),
    FIM_END: ("<｜fim▁end｜>",),
}
LOOKS_SPECIAL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class DocumentEncoder:
    """Text to ids with a saved tokenizer; special tokens written out in the text are read as ordinary text.

    Attributes:
        special_ids: id by our name of each special token (`EOS`, `FIM_BEGIN`, …) that the tokenizer has, under whatever
            name; beginning, end and padding are those that its files name.
        vocab_size: one more than the largest id.

    Raises:
        TokenizerError: the folder has no tokenizer.json, or names no end of a text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = _content(folder)
        named = special_tokens(folder)
        # Else a document *about* `<|eos_token|>` (this file, say) would end there. Released tokenizers mark few of
        # theirs as special.
        ordinary = {
            *named.values(),
            *SPECIAL_TOKENS,
            *(name for names in _OTHER_NAMES.values() for name in names),
        }
        content["added_tokens"] = added_tokens(folder)
        for token in content["added_tokens"]:
            if token["content"] in ordinary or LOOKS_SPECIAL.fullmatch(token["content"]):
                token["special"] = True
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library has no class of its own for it
            raise TokenizerError(f"{folder / TOKENIZER_FILE}: no tokenizer ({error})") from None
        self._tokenizer.encode_special_tokens = True
        self.special_ids: dict[str, int] = {}
        for token in SPECIAL_TOKENS:
            candidates = (named.get(_ROLES.get(token, "")), token, *_OTHER_NAMES.get(token, ()))
            ids = (self._tokenizer.token_to_id(name) for name in candidates if name is not None)
            found = next((number for number in ids if number is not None), None)
            if found is not None:
                self.special_ids[token] = found
        if EOS not in self.special_ids:
            raise TokenizerError(
                f"{folder / TOKENIZER_CONFIG}: names no eos_token that {TOKENIZER_FILE} has: name what ends a text"
            )
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1

    def require(self, tokens: Iterable[str], option: str) -> None:
        """Raise TokenizerError, which names the option that needs them, unless the tokenizer has these tokens."""
        missing = [token for token in tokens if token not in self.special_ids]
        if missing:
            raise TokenizerError(
                f"{option}: {self.folder / TOKENIZER_FILE} lacks the special tokens {', '.join(missing)}"
            )

    @property
    def pad_id(self) -> int:
        """What fills rows up: the padding token, or the end where there is none."""
        return self.special_ids.get(PAD, self.special_ids[EOS])

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


def _content(folder: Path) -> dict[str, Any]:
    content = read_json(folder / TOKENIZER_FILE)
    if content is None:
        there = [
            name for name in ("tiktoken.model", "tokenizer.model", "vocab.json") if (folder / name).is_file()
        ]
        hint = (
            f" ({', '.join(there)} is there: save it as a fast tokenizer with transformers first)"
            if there
            else ""
        )
        raise TokenizerError(f"{folder / TOKENIZER_FILE} is not there{hint}")
    return content
