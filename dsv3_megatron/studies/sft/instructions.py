"""Conversations from the demo's corpus: a function's docstring is the question, its signature the answer."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv3_megatron.data.documents import document_id, is_validation
from dsv3_megatron.sft.conversation import Conversation
from dsv3_megatron.sft.prepare import SPLITS

SYSTEM = "Write the signature of the Python function that this docstring describes."
LONGEST_QUESTION = 300  # characters; the first lines of a docstring say what the function does


def conversations(
    files: Sequence[Path], valid_fraction: float, limits: dict[str, int]
) -> dict[str, list[Conversation]]:
    """Conversations by split, at most `limits[split]` each.

    Held out are the functions of the files that pre-training holds out (the same rule, the same fraction), so neither
    training has seen them.
    """
    found: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    for file in files:
        text = file.read_text(encoding="utf-8")
        split = "valid" if is_validation(document_id(text), valid_fraction) else "train"
        for question, answer in documented_functions(text):
            if len(found[split]) < limits[split]:
                messages = [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                found[split].append(Conversation(messages))
    return found


def documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """(docstring's beginning, signature on one line) of each function that has both; none of source that has errors."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
            yield docstring[:LONGEST_QUESTION].strip(), f"def {node.name}({ast.unparse(node.args)}){returns}:"
