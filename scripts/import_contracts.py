"""A contract for import-linter that knows modules of other packages in full (its own knows their first name)."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class ForeignModules(Contract):
    """`source_modules`, with all that is below them, import none of `forbidden_modules`, inside functions neither."""

    type_name = "foreign_modules"
    source_modules: Any = fields.ListField(subfield=fields.StringField())
    forbidden_modules: Any = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Reads the files of the source modules."""
        below = {
            module
            for source in self.source_modules
            for module in {source} | graph.find_descendants(source)
            if module in graph.modules
        }
        found = [
            f"{module} -> {name} (l. {line})"
            for module in sorted(below)
            for name, line in imported_names(_file(module))
            if any(name == no or name.startswith(f"{no}.") for no in self.forbidden_modules)
        ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print what was found."""
        for line in check.metadata["found"]:
            output.print_error(line)


def imported_names(file: Path) -> Iterator[tuple[str, int]]:
    """Full names that a file imports, of modules or of what is in them, with their lines; relative ones left out."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _file(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)
