"""Reading a shell script without running it: its variables, its conditions, and the commands that it would start.

A subset of bash: assignments (also of arrays), `${X:-default}` and its relatives, `$((…))`, positional arguments, `if`,
`case`, `for`, functions, here-documents, `eval`, `bash -c`, `source` of files beside the script. What is not known (a
variable from outside, the output of a command) stays in the words as `${NAME}`; a condition that depends on it counts
as false and is noted.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_megatron.adopt.arithmetic import evaluate
from dsv3_megatron.adopt.expand import Expander
from dsv3_megatron.adopt.launcher import OF_STEP, allocation
from dsv3_megatron.adopt.strings import as_list, compare, matches
from dsv3_megatron.adopt.syntax import statements
from dsv3_megatron.adopt.tokens import Token, tokens

__all__ = ["Command", "Script", "names", "read"]

ROUNDS = 200  # of a loop
DEPTH = 12  # of functions, sourced files and evals in each other
# Commands that start a script which they are given.
STARTERS = (
    "bash", "sh", "sbatch", "srun", "salloc", "exec", "nohup", "time", "timeout", "env", "mpirun", "mpiexec", "pdsh",
    "ssh", "sudo", "numactl", "singularity", "apptainer", "docker", "podman",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command that the script would start.

    Attributes:
        words: its words, variables replaced.
        line: where it begins in its file.
        env: variables of the environment that change how long a step takes.
        file: in which it stands.
    """

    words: tuple[str, ...]
    line: int
    env: dict[str, str] = field(default_factory=dict)
    file: Path | None = None


@dataclass
class Script:
    """What reading a script gave.

    Attributes:
        commands: in the order in which they would be started.
        variables: at the end.
        notes: what could not be decided, for people.
        names: all words that could be variables, in all that was read.
        exported: variables that commands get.
        slurm: options of the allocation, from `#SBATCH` lines.
        started: other scripts that it starts, and whether they were found and read.
    """

    commands: list[Command] = field(default_factory=list)
    variables: dict[str, str | list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    exported: set[str] = field(default_factory=set)
    slurm: list[str] = field(default_factory=list)
    started: dict[str, bool] = field(default_factory=dict)


def read(path: Path, arguments: Sequence[str] = (), given: Mapping[str, str] | None = None) -> Script:
    """Read a script.

    Args:
        arguments: `$1`, `$2`, …
        given: variables that the environment would give; they also win over assignments of empty values.

    Raises:
        ValueError: it is not text, or its quotes do not end.
    """
    script = Script(variables=dict(given or {}), exported=set(given or {}))
    _Reader(script, path.resolve(), list(arguments)).run(path.read_text(), 1)
    return script


_ASSIGNED = re.compile(r"(?:^|[\s;(])([A-Za-z_]\w*)\+?=")


def names(text: str) -> set[str]:
    """Words that could be variables."""
    return set(re.findall(r"[A-Za-z_]\w*", text))


class _Break(Exception):
    """A loop is left."""


class _Reader(Expander):
    """Reads one file, or a text in it.

    Attributes:
        script: what has been found.
        folder: where files are that it names.
        functions: their texts.
        depth: of files, functions and evals in each other.
        files: those that are being read, this one last.
    """

    def __init__(
        self,
        script: Script,
        file: Path,
        arguments: list[str],
        depth: int = 0,
        files: tuple[Path, ...] | None = None,
    ) -> None:
        super().__init__(script.variables, file, arguments)
        self.script, self.folder, self.depth = script, file.parent, depth
        self.files = (file,) if files is None else files
        self.functions: dict[str, str] = {}

    def run(self, text: str, first_line: int) -> None:
        self.assigned |= set(_ASSIGNED.findall(text))
        self.script.names |= names(text)
        self.script.slurm += allocation(text)
        self._block(statements(tokens(text, first_line)))

    def _read_file(self, path: Path, arguments: list[str]) -> None:
        path = path.resolve()
        if self.files.count(path) > 1:  # it starts itself, again and again
            return
        inner = _Reader(self.script, path, arguments, self.depth + 1, (*self.files, path))
        inner.functions, inner.assigned = self.functions, self.assigned
        inner.run(path.read_text(), 1)

    def _inside(self, text: str, line: int, arguments: list[str] | None = None) -> None:
        """Read text that is part of a command: eval, a function's body, a here-document."""
        if self.depth >= DEPTH:
            return
        inner = _Reader(
            self.script,
            self.file,
            self.arguments if arguments is None else arguments,
            self.depth + 1,
            self.files,
        )
        inner.functions, inner.assigned, inner.aliases = self.functions, self.assigned, dict(self.aliases)
        inner.run(text, line)

    # --- statements

    def _block(self, block: list) -> None:
        for kind, *parts in block:
            getattr(self, f"_{kind}")(*parts)

    def _if(self, branches: list, otherwise: list) -> None:
        for condition, body in branches:
            value = self._condition(condition)
            if value:
                self._block(body)
                return
        self._block(otherwise)

    def _for(self, name: str, words: list[Token], body: list) -> None:
        with contextlib.suppress(_Break):
            for value in self.words(words):
                self.variables[name] = value
                self._block(body)

    def _while(self, condition: list, body: list) -> None:
        """Loops that wait or read input, whose condition is not known, are not gone through."""
        with contextlib.suppress(_Break):
            for _ in range(ROUNDS):
                if not self._decide(condition):
                    return
                self._block(body)

    def _run_break(self, words: list[str], line: int) -> None:
        raise _Break

    def _case(self, subject: list[Token], branches: list) -> None:
        value = " ".join(self.words(subject))
        if "${" in value:
            self._undecided(f"case {value}", subject)
            return
        for patterns, body in branches:
            if any(matches(value, self.text(pattern)) for pattern in patterns):
                self._block(body)
                return

    def _function(self, name: str, body: str) -> None:
        self.functions[name] = body

    def _simple(self, words: list[Token], documents: list[str]) -> None:
        words = list(words)
        assigned: list[tuple[str, str, list[Token] | Token]] = []
        while words and (found := words[0].assignment()):
            assigned.append(found)
            words.pop(0)
        if not words:
            for name, sign, value in assigned:
                self._assign(name, sign, value)
            return
        if words[0].text == "((":
            self._count(" ".join(word.text for word in words[1:-1]))
            return
        line = words[0].line
        expanded = self.words(words)
        if not expanded:
            return
        name = expanded[0].rpartition("/")[2]
        before = dict(self.variables)
        for variable, sign, value in assigned:
            self._assign(variable, sign, value)
        handler: Callable | None = getattr(self, f"_run_{name}", None) if name.isidentifier() else None
        if name in ("export", "declare", "local", "readonly", "typeset"):
            self._declare(words[1:], name == "export" or "-x" in expanded)
        elif name in self.functions:
            self._inside(self.functions[name], line, expanded[1:])
        elif name in ("source", "."):
            self._source(expanded[1:], line)
        elif name == "eval":
            self._inside(" ".join(expanded[1:]), line)
        elif handler is not None:
            handler(expanded, line)
        else:
            self.script.commands.append(
                Command(tuple(expanded), line, self._env([name for name, *_ in assigned]), self.file)
            )
            self._nested(expanded, line)
            for document in documents:
                # What is only written somewhere counts where it is a script.
                if name not in ("cat", "tee") or document.startswith("#!"):
                    self._inside(document, line)
        if assigned and name not in self.functions:  # they were this command's only
            self.variables.clear()
            self.variables.update(before)

    def _count(self, text: str) -> None:
        """`((X = Y + 1))`, `((X += 2))`, `((X++))` as a command."""
        match = re.fullmatch(r"\s*(\w+)\s*(\+\+|--|[-+*/%]?=(?!=)\s*(.+))\s*", text, re.DOTALL)
        if match is None:
            return
        name, how, right = match[1], match[2], match[3] or "1"
        sign = how[0] if how[0] != "=" else ""
        value = evaluate(self.expand_text(f"{name} {sign} ({right})" if sign else right), self.number)
        self.variables[name] = "${" + name + "}" if value is None else str(value)

    def _nested(self, words: list[str], line: int) -> None:
        """`bash -c "…"` and scripts that are started by name."""
        for i, word in enumerate(words[:-1]):
            if word == "-c" and words[i - 1].rpartition("/")[2] in ("bash", "sh"):
                self._inside(words[i + 1], line)
                return
        at = next((i for i, word in enumerate(words) if word.endswith(".sh")), None)
        if at is None or (at and words[0].rpartition("/")[2] not in STARTERS):
            return
        path = self._script_at(words[at])
        self.script.started[words[at]] = path is not None
        if path is not None and self.depth < DEPTH:
            self._read_file(path, words[at + 1 :])

    def _script_at(self, word: str) -> Path | None:
        """The file of a script that is started from this one's folder, the one above, here, or that lies beside it."""
        places = (self.folder / word, self.folder.parent / word, Path(word), self.folder / Path(word).name)
        return next((path for path in places if path.is_file()), None)

    def _env(self, assigned: Sequence[str]) -> dict[str, str]:
        """Of what commands get, that which a step's time may depend on."""
        known = {name: self.variables.get(name) for name in sorted(self.script.exported.union(assigned))}
        return {
            name: value
            for name, value in known.items()
            if isinstance(value, str) and OF_STEP.fullmatch(name) is not None
        }

    def _run_set(self, words: list[str], line: int) -> None:
        if "--" in words:
            self.arguments = words[words.index("--") + 1 :]

    def _run_shift(self, words: list[str], line: int) -> None:
        self.arguments = self.arguments[int(words[1]) if len(words) > 1 and words[1].isdigit() else 1 :]

    def _run_unset(self, words: list[str], line: int) -> None:
        for name in words[1:]:
            self.variables.pop(name, None)

    def _run_exit(self, words: list[str], line: int) -> None:
        """Scripts leave where an argument is wrong; what was not decided may have led there."""

    _run_return = _run_echo = _run_cd = _run_exit

    def _source(self, words: list[str], line: int) -> None:
        path = self.folder / words[0] if words else None
        if path is not None and path.is_file() and self.depth < DEPTH:
            self._read_file(path, words[1:] or self.arguments)
        elif words:
            self.script.notes.append(
                f"line {line}: {words[0]} is not beside the script: what it sets is not known"
            )

    def _declare(self, words: list[Token], exported: bool) -> None:
        for word in words:
            found = word.assignment()
            if exported:
                self.script.exported.add(found[0] if found else word.text)
            if found and any(other.text == "-n" for other in words):
                value = found[2]
                self.aliases[found[0]] = self.text(value) if isinstance(value, Token) else ""
            elif found:
                self._assign(*found)

    def _assign(self, name: str, sign: str, value: "list[Token] | str | Token") -> None:
        variables = self.variables
        base, _, index = name.partition("[")
        base = self.aliases.get(base, base)
        if isinstance(value, list):
            keyed = [found for word in value if (found := _KEYED.match(word.text))]
            if value and len(keyed) == len(value):
                for word, found in zip(value, keyed, strict=True):
                    variables[f"{base}[{found[1]}]"] = self.text(word)[len(found[0]) :]
                return
            words: str | list[str] = self.words(value)
            if sign == "+=":
                words = [*as_list(variables.get(base, [])), *words]
        else:
            assert isinstance(value, Token)
            words = self.text(value)
            if index:
                key = self.expand_text(index.rstrip("]"))
                items = as_list(variables.get(base, []))
                if key.isdigit():
                    items += [""] * (int(key) + 1 - len(items))
                    items[int(key)] = words
                    words = items
                else:
                    base = f"{base}[{key}]"
            elif sign == "+=":
                before = variables.get(base, "")
                words = [*before, words] if isinstance(before, list) else before + words
        variables[base] = words

    # --- conditions

    def _condition(self, condition: list) -> bool | None:
        """True, False, or None where it depends on something that is not known, which is noted."""
        value = self._decide(condition)
        if value is None:
            flat = [word for part in condition if part not in ("&&", "||") for word in part[1]]
            self._undecided(" ".join(word.text for word in flat), flat)
        return value

    def _decide(self, condition: list) -> bool | None:
        value: bool | None = True
        sign = "&&"
        for part in condition:
            if part in ("&&", "||"):
                sign = part
                continue
            negated, words = part
            this = self._test(words)
            if this is not None and negated:
                this = not this
            if sign == "&&":
                value = False if value is False or this is False else None if None in (value, this) else True
            else:
                value = True if value or this else None if None in (value, this) else False
        return value

    def _undecided(self, text: str, words: list[Token]) -> None:
        line = words[0].line if words else 0
        note = f"line {line}: `{text}` could not be decided and counts as false"
        if note not in self.script.notes:
            self.script.notes.append(note)

    def _test(self, words: list[Token]) -> bool | None:
        if not words:
            return None
        first = words[0].text
        if first == "((":
            return self._arithmetic(" ".join(word.text for word in words[1:-1]))
        if first in ("[", "[[", "test"):
            inner = words[1:] if first == "test" else words[1:-1]
            return self._bracket([self.text(word) for word in inner], [w.quoted for w in inner])
        text = self.words(words)
        return {"true": True, ":": True, "false": False}.get(text[0] if text else "")

    def _arithmetic(self, text: str) -> bool | None:
        value = evaluate(self.expand_text(text), self.number)
        return None if value is None else value != 0

    def _bracket(self, words: list[str], quoted: list[bool]) -> bool | None:
        """`[ … ]` with -a and -o, `[[ … ]]` with && and ||."""
        for sign, combine in (("||", any), ("-o", any), ("&&", all), ("-a", all)):
            if sign in words[1:-1]:
                at = words.index(sign, 1)
                sides = [
                    self._bracket(words[:at], quoted[:at]),
                    self._bracket(words[at + 1 :], quoted[at + 1 :]),
                ]
                if combine is any:
                    return True if True in sides else None if None in sides else False
                return False if False in sides else None if None in sides else True
        if words and words[0] == "!":
            value = self._bracket(words[1:], quoted[1:])
            return None if value is None else not value
        words = [word for word in words if word not in ("(", ")")]
        if len(words) == 1:
            return None if "${" in words[0] else bool(words[0])
        if len(words) == 2 and words[0] in ("-z", "-n"):
            empty = words[1] == "" or re.fullmatch(r"\$\{\w+\}", words[1]) is not None  # never set: empty
            return empty if words[0] == "-z" else not empty
        if len(words) == 2 and words[0] == "-v":
            base, bracket, index = words[1].partition("[")
            return self.aliases.get(base, base) + bracket + index in self.variables
        if len(words) == 2:  # a question about files: those of another machine are not known
            return True if Path(words[1]).exists() else None
        if len(words) == 3 and not any("${" in word or "$(" in word for word in (words[0], words[2])):
            return compare(words[0], words[1], words[2])
        return None


_KEYED = re.compile(r"\[([^\]]*)\]=")
