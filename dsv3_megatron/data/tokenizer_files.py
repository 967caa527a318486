"""A Hugging Face tokenizer folder without transformers: its files, the special tokens it names, its chat template."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "TOKENIZER_CONFIG",
    "TOKENIZER_FILE",
    "TOKENIZER_FILES",
    "TokenizerError",
    "added_tokens",
    "chat_template",
    "copy_files",
    "read_json",
    "remote_code",
    "special_tokens",
    "token_id",
    "tokenizer_files",
    "without_paths",
]

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # one file per named template
# All that may be one; code that `auto_map` names comes on top (`remote_code`).
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    CHAT_TEMPLATE_FILE,
    "chat_template.json",
)
# Keys of those files and of config.json that say where somebody had them.
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used; the message names the file and what to do."""


def tokenizer_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of the files that make its tokenizer; nothing else of it."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    names += sorted(
        f"{MORE_TEMPLATES}/{path.name}"
        for path in (folder / MORE_TEMPLATES).glob("*.jinja")
        if path.is_file()
    )
    return names + remote_code(folder, TOKENIZER_CONFIG)


def remote_code(folder: Path, config: str) -> list[str]:
    """The modules in the folder that `auto_map` of one of its JSON files names, and those that they import from it."""
    auto_map = (read_json(folder / config) or {}).get("auto_map") or {}
    found: list[str] = []
    waiting = [entry.split(".")[0] for entry in _strings(auto_map) if "--" not in entry]
    while waiting:
        module = waiting.pop()
        name = f"{module}.py"
        if not module.isidentifier() or name in found or not (folder / name).is_file():
            continue
        found.append(name)
        waiting += re.findall(r"^\s*from \.(\w+) import", (folder / name).read_text(), re.MULTILINE)
    return sorted(found)


def _strings(value: Any) -> Iterator[str]:
    """All strings of a nested value of lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy byte for byte, but for keys of JSON files that hold a path of this machine, which are left out."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        content = read_json(source / name) if name.endswith(".json") and name != TOKENIZER_FILE else None
        if content is not None and content.keys() & set(_PATHS):
            text = json.dumps(without_paths(content), indent=2, ensure_ascii=False)
            (target / name).write_text(text + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / name, target / name)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of a JSON file without the keys that say where somebody had it."""
    return {key: value for key, value in config.items() if key not in _PATHS}


def special_tokens(folder: Path) -> dict[str, str]:
    """Token by role (`eos_token`, …), of tokenizer_config.json, else special_tokens_map.json, else the ids of
    generation_config.json and config.json."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        content = read_json(folder / name) or {}
        for role in _ROLES:
            token = content.get(role)
            if isinstance(token, dict):  # an AddedToken
                token = token.get("content")
            if isinstance(token, str):
                tokens[role] = token
    for name in ("generation_config.json", "config.json"):
        content = read_json(folder / name) or {}
        for role in ("bos_token", "eos_token", "pad_token"):
            number = content.get(f"{role}_id")
            number = number[0] if isinstance(number, list) and number else number
            if role not in tokens and isinstance(number, int):
                added = {entry["id"]: entry["content"] for entry in added_tokens(folder)}
                if number in added:
                    tokens[role] = added[number]
    return tokens


def token_id(folder: Path, token: str) -> int | None:
    """Id of a token, None where the folder's JSON files do not say it."""
    for entry in added_tokens(folder):
        if entry["content"] == token:
            return entry["id"]
    model = (read_json(folder / TOKENIZER_FILE) or {}).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and token in vocabulary:
        return vocabulary[token]
    decoder = (read_json(folder / TOKENIZER_CONFIG) or {}).get("added_tokens_decoder") or {}
    try:
        return next((int(number) for number, entry in decoder.items() if entry.get("content") == token), None)
    except (AttributeError, ValueError):
        raise TokenizerError(
            f"{folder / TOKENIZER_CONFIG}: added_tokens_decoder is not an object of tokens by id"
        ) from None


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """The tokens of tokenizer.json beside its model's, each with `id` and `content`.

    Raises:
        TokenizerError: they are something else.
    """
    found = (read_json(folder / TOKENIZER_FILE) or {}).get("added_tokens") or []
    if not isinstance(found, list) or not all(_is_token(entry) for entry in found):
        raise TokenizerError(
            f"{folder / TOKENIZER_FILE}: added_tokens is not a list of tokens with id and content"
        )
    return found


def _is_token(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("content"), str)
    )


def chat_template(folder: Path) -> str | dict[str, str] | None:
    """The folder's jinja template, or templates by name, from where transformers looks for them; None without any."""
    named = {path.stem: path.read_text() for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        default: Any = (folder / CHAT_TEMPLATE_FILE).read_text()
    else:
        default = (read_json(folder / "chat_template.json") or {}).get("chat_template")
        default = default or (read_json(folder / TOKENIZER_CONFIG) or {}).get("chat_template")
    if isinstance(default, list):
        try:
            default = {entry["name"]: entry["template"] for entry in default}
        except (KeyError, TypeError):
            default = {"": None}  # refused below
    texts = list(default.values()) if isinstance(default, dict) else [default or ""]
    if not all(isinstance(text, str) for text in texts):
        raise TokenizerError(
            f"{folder}: chat_template is neither a text nor a list of objects with name and template"
        )
    if isinstance(default, dict):
        return {**default, **named}
    if named:
        return {**({"default": default} if default else {}), **named}
    return default or None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no such file.

    Raises:
        TokenizerError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return value
