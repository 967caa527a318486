"""Reading a shell script without running it: its variables, its conditions, and the commands that it would start.

A subset of bash: assignments (also of arrays), `${X:-default}` and its relatives, `$((…))`, positional arguments, `if`,
`case`, `for`, functions, here-documents, `eval`, `bash -c`, `source` of files beside the script. What is not known (a
variable from outside, the output of a command) stays in the words as `${NAME}`; a condition that depends on it counts
as false and is noted.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_megatron.adopt.arithmetic import evaluate
from dsv3_megatron.adopt.syntax import Token, end_of_expansion, statements, tokens

__all__ = ["Command", "Script", "read"]

DEPTH = 12  # of functions, sourced files and evals in each other


@dataclass(frozen=True)
class Command:
    """A command that the script would start.

    Attributes:
        words: its words, variables replaced.
        line: where it begins in its file.
    """

    words: tuple[str, ...]
    line: int


@dataclass
class Script:
    """What reading a script gave.

    Attributes:
        commands: in the order in which they would be started.
        variables: at the end.
        notes: what could not be decided, for people.
    """

    commands: list[Command] = field(default_factory=list)
    variables: dict[str, str | list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(path: Path, arguments: Sequence[str] = (), given: Mapping[str, str] | None = None) -> Script:
    """Read a script.

    Args:
        arguments: `$1`, `$2`, …
        given: variables that the environment would give; they also win over assignments of empty values.

    Raises:
        ValueError: it is not text, or its quotes do not end.
    """
    script = Script(variables=dict(given or {}))
    _Reader(script, path.resolve(), list(arguments)).run(path.read_text(), 1)
    return script


_ASSIGNED = re.compile(r"(?:^|[\s;(])([A-Za-z_]\w*)\+?=")


class _Reader:
    """Reads one file, or a text in it.

    Attributes:
        assigned: names that the file sets somewhere; where it has not, they are empty.
        aliases: what `declare -n` calls another name.
    """

    def __init__(self, script: Script, file: Path, arguments: list[str], depth: int = 0) -> None:
        self.script, self.file, self.folder, self.arguments, self.depth = (
            script,
            file,
            file.parent,
            arguments,
            depth,
        )
        self.functions: dict[str, str] = {}
        self.assigned: set[str] = set()
        self.aliases: dict[str, str] = {}

    def run(self, text: str, first_line: int) -> None:
        self.assigned |= set(_ASSIGNED.findall(text))
        self._block(statements(tokens(text, first_line)))

    def _read_file(self, path: Path, arguments: list[str]) -> None:
        inner = _Reader(self.script, path, arguments, self.depth + 1)
        inner.functions, inner.assigned = self.functions, self.assigned
        inner.run(path.read_text(), 1)

    def _inside(self, text: str, line: int, arguments: list[str] | None = None) -> None:
        """Read text that is part of a command: eval, a function's body, a here-document."""
        if self.depth >= DEPTH:
            return
        inner = _Reader(
            self.script, self.file, self.arguments if arguments is None else arguments, self.depth + 1
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
        for value in self._words(words):
            self.script.variables[name] = value
            self._block(body)

    def _while(self, condition: list, body: list) -> None:
        """Loops that wait or read input are not gone through."""

    def _case(self, subject: list[Token], branches: list) -> None:
        value = " ".join(self._words(subject))
        if "${" in value:
            self._undecided(f"case {value}", subject)
            return
        for patterns, body in branches:
            if any(_matches(value, self._text(pattern)) for pattern in patterns):
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
        line = words[0].line
        expanded = self._words(words)
        if not expanded:
            return
        name = expanded[0].rpartition("/")[2]
        before = dict(self.script.variables)
        for variable, sign, value in assigned:
            self._assign(variable, sign, value)
        handler: Callable | None = getattr(self, f"_run_{name}", None) if name.isidentifier() else None
        if name in ("export", "declare", "local", "readonly", "typeset"):
            self._declare(words[1:])
        elif name in self.functions:
            self._inside(self.functions[name], line, expanded[1:])
        elif name in ("source", "."):
            self._source(expanded[1:], line)
        elif name == "eval":
            self._inside(" ".join(expanded[1:]), line)
        elif handler is not None:
            handler(expanded, line)
        else:
            self.script.commands.append(Command(tuple(expanded), line))
            self._nested(expanded, line)
            for document in documents:
                self._inside(document, line)
        if assigned and name not in self.functions:
            self.script.variables = before  # they were this command's only

    def _nested(self, words: list[str], line: int) -> None:
        """`bash -c "…"` and scripts that are started by name."""
        for i, word in enumerate(words[:-1]):
            if word == "-c" and words[i - 1].rpartition("/")[2] in ("bash", "sh"):
                self._inside(words[i + 1], line)
                return
        for i, word in enumerate(words):
            if word.endswith(".sh") and words[max(0, i - 1)].rpartition("/")[2] in (
                "bash",
                "sh",
                "sbatch",
                word,
            ):
                path = self.folder / word
                if path.is_file() and self.depth < DEPTH:
                    self._read_file(path, words[i + 1 :])
                return

    def _run_set(self, words: list[str], line: int) -> None:
        if "--" in words:
            self.arguments = words[words.index("--") + 1 :]

    def _run_shift(self, words: list[str], line: int) -> None:
        self.arguments = self.arguments[int(words[1]) if len(words) > 1 and words[1].isdigit() else 1 :]

    def _run_unset(self, words: list[str], line: int) -> None:
        for name in words[1:]:
            self.script.variables.pop(name, None)

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

    def _declare(self, words: list[Token]) -> None:
        for word in words:
            found = word.assignment()
            if found and any(other.text == "-n" for other in words):
                value = found[2]
                self.aliases[found[0]] = self._text(value) if isinstance(value, Token) else ""
            elif found:
                self._assign(*found)

    def _assign(self, name: str, sign: str, value: "list[Token] | str | Token") -> None:
        variables = self.script.variables
        base, _, index = name.partition("[")
        base = self.aliases.get(base, base)
        if isinstance(value, list):
            keyed = [found for word in value if (found := _KEYED.match(word.text))]
            if value and len(keyed) == len(value):
                for word, found in zip(value, keyed, strict=True):
                    variables[f"{base}[{found[1]}]"] = self._text(word)[len(found[0]) :]
                return
            words: str | list[str] = self._words(value)
            if sign == "+=":
                words = [*_as_list(variables.get(base, [])), *words]
        else:
            assert isinstance(value, Token)
            words = self._text(value)
            if index:
                key = self._expand_text(index.rstrip("]"))
                items = _as_list(variables.get(base, []))
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
        """True, False, or None where it depends on something that is not known."""
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
        if value is None:
            flat = [word for part in condition if part not in ("&&", "||") for word in part[1]]
            self._undecided(" ".join(word.text for word in flat), flat)
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
            return self._bracket([self._text(word) for word in inner], [w.quoted for w in inner])
        text = self._words(words)
        return {"true": True, ":": True, "false": False}.get(text[0] if text else "")

    def _arithmetic(self, text: str) -> bool | None:
        value = evaluate(self._expand_text(text), self._number)
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
            return self.aliases.get(base, base) + bracket + index in self.script.variables
        if len(words) == 2:  # a question about files: those of another machine are not known
            return True if Path(words[1]).exists() else None
        if len(words) == 3 and not any("${" in word or "$(" in word for word in (words[0], words[2])):
            return _compare(words[0], words[1], words[2])
        return None

    # --- words

    def _words(self, words: Sequence[Token]) -> list[str]:
        found: list[str] = []
        for word in words:
            found += self._fields(word)
        return found

    def _fields(self, word: Token) -> list[str]:
        """One word expanded: split at white space where it is not quoted."""
        fields: list[str] = []
        pending: str | None = None
        for text, mode in word.pieces:
            if mode == "literal":
                pending = (pending or "") + text
                continue
            array = re.fullmatch(r"\$\{(\w+)\[[@*]\]\}|\$[@*]", text)
            if array and mode in ("quoted", "bare"):
                items = (
                    self.arguments if array[1] is None else _as_list(self.script.variables.get(array[1], []))
                )
                if mode == "bare":
                    items = [part for item in items for part in item.split()]
                for i, item in enumerate(items):
                    if i and pending is not None:
                        fields.append(pending)
                        pending = None
                    pending = (pending or "") + item
                continue
            value = self._expand_text(text)
            if mode == "quoted":
                pending = (pending or "") + value
                continue
            parts = value.split()
            if not parts:
                continue
            if value[:1].isspace() and pending is not None:
                fields.append(pending)
                pending = None
            pending = (pending or "") + parts[0]
            for part in parts[1:]:
                fields.append(pending)
                pending = part
            if value[-1:].isspace():
                fields.append(pending)
                pending = None
        if pending is not None:
            fields.append(pending)
        return fields

    def _text(self, word: Token) -> str:
        """One word expanded without being split."""
        return "".join(text if mode == "literal" else self._expand_text(text) for text, mode in word.pieces)

    def _expand_text(self, text: str) -> str:
        return "".join(self._expansions(text))

    def _expansions(self, text: str) -> Iterator[str]:
        """Replace what begins with `$` or a backquote in a text."""
        position = 0
        while position < len(text):
            at = min((i for i in (text.find("$", position), text.find("`", position)) if i >= 0), default=-1)
            if at < 0:
                yield text[position:]
                return
            yield text[position:at]
            end = end_of_expansion(text, at)
            yield self._expansion(text[at:end])
            position = end

    def _expansion(self, text: str) -> str:
        if text.startswith("$((") and text.endswith("))"):
            value = evaluate(self._expand_text(text[3:-2]), self._number)
            return text if value is None else str(value)
        if text.startswith(("$(", "`")):
            return self._output(text)
        if text.startswith("${"):
            return self._parameter(text[2:-1])
        return self._value(text[1:], text) if len(text) > 1 else text

    def _output(self, text: str) -> str:
        """The output of a command, where it is plain: echo of known words."""
        inner = text[2:-1] if text.startswith("$(") else text[1:-1]
        if "dirname" in inner or "readlink" in inner or "realpath" in inner:
            place = self._place(inner)
            if place is not None:
                return place
        if inner.lstrip().startswith("yq") and "MODEL_ARGS" in inner:
            words = self._model_arguments(inner)
            if words is not None:
                return words
        match = re.fullmatch(r"\s*echo\s+(-n\s+)?(.*)", inner, re.DOTALL)
        if match and "|" not in inner and ";" not in inner:
            value = self._expand_text(match[2].strip().strip("\"'"))
            if "${" not in value:
                return value
        return "${" + re.sub(r"\W+", "_", inner.strip())[:24].strip("_") + "}"

    def _place(self, inner: str) -> str | None:
        """The usual ways to find the script's own folder, and `dirname` of a known path."""
        levels = len(re.findall(r"\bdirname\b", inner))
        if re.search(r"\$0|\$\{?BASH_SOURCE", inner):
            path = self.file
        else:
            words = self._expand_text(
                re.sub(r"\$\(|\)|\b(dirname|readlink|realpath)\b|-f|[\"']", " ", inner)
            ).split()
            if len(words) != 1 or "$" in words[0]:
                return None
            path = Path(words[0])
        for _ in range(levels):
            path = path.parent
        return str(path)

    def _model_arguments(self, inner: str) -> str | None:
        """`yq … MODEL_ARGS … FILE`, as Megatron-MoE-ModelZoo turns its YAML files into options."""
        from dsv3_megatron.adopt import zoo

        path = Path(self._expand_text(inner.split()[-1]))
        if not path.is_file():
            return None
        single = re.search(r'MODEL_ARGS\."(--[\w-]+)"', inner)
        table = {k: self._expand_text(v) for k, v in zoo.model_arguments(path).items()}
        return table.get(single[1], "null") if single else " ".join(zoo.words(table))

    def _parameter(self, text: str) -> str:
        if text.startswith("#"):
            items = (
                self.arguments
                if text[1:] in ("@", "*")
                else self.script.variables.get(text[1:].partition("[")[0])
            )
            return "0" if items is None else str(len(items))
        match = re.fullmatch(
            r"(\w+|[@*#?])(\[[^\]]*\])?(:?[-=+?]|##?|%%?|//?|:|,,|\^\^)?(.*)", text, re.DOTALL
        )
        if match is None:
            return "${" + text + "}"
        name, index, sign, rest = match[1], match[2] or "", match[3] or "", match[4]
        unknown = "${" + name + index + "}"
        value = self._value(name + index, unknown)
        known = value != unknown and (value != "" or self.aliases.get(name, name) in self.script.variables)
        if not sign:
            return value
        if sign in (":-", "-", ":=", "="):
            use_default = not known or (sign.startswith(":") and value == "")
            result = self._expand_text(_unquoted(rest)) if use_default else value
            if sign.endswith("=") and use_default:
                self.script.variables[name] = result
            return result
        if sign in (":+", "+"):
            return self._expand_text(_unquoted(rest)) if known and (value or sign == "+") else ""
        if not known or sign in (":?", "?"):
            return value
        return _edited(value, sign, self._expand_text(_unquoted(rest)))

    def _value(self, name: str, unknown: str) -> str:
        base, _, index = name.partition("[")
        base = self.aliases.get(base, base)
        if base in ("@", "*"):
            return " ".join(self.arguments)
        if base == "#":
            return str(len(self.arguments))
        if base.isdigit():
            number = int(base)
            if 1 <= number <= len(self.arguments):
                return self.arguments[number - 1]
            return unknown if unknown.startswith("${") else "${" + base + "}"
        variables = self.script.variables
        if index:
            key = self._expand_text(index.rstrip("]"))
            if f"{base}[{key}]" in variables:
                return str(variables[f"{base}[{key}]"])
            items = variables.get(base)
            if items is None:
                return "" if base in self.assigned else unknown
            if key in ("@", "*"):
                return " ".join(_as_list(items))
            position = evaluate(key, self._number)
            listed = _as_list(items)
            return listed[position] if position is not None and -len(listed) <= position < len(listed) else ""
        value = variables.get(base)
        if value is None:
            if base in self.assigned:
                return ""
            return unknown if unknown.startswith("${") else "${" + base + "}"
        return (value[0] if value else "") if isinstance(value, list) else value

    def _number(self, name: str) -> int | None:
        value = self._value(name, "")
        return int(value) if re.fullmatch(r"-?\d+", value) else None


_KEYED = re.compile(r"\[([^\]]*)\]=")


def _as_list(value: str | list[str]) -> list[str]:
    return list(value) if isinstance(value, list) else [value] if value else []


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def _compare(a: str, sign: str, b: str) -> bool | None:
    if sign in ("=", "=="):
        return _matches(a, b)
    if sign == "!=":
        return not _matches(a, b)
    if sign == "=~":
        try:
            return re.search(b, a) is not None
        except re.error:
            return None
    numbers = {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}
    if sign in numbers and re.fullmatch(r"-?\d+", a) and re.fullmatch(r"-?\d+", b):
        x, y = int(a), int(b)
        return {"==": x == y, "!=": x != y, "<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y}[numbers[sign]]
    if sign in ("<", ">"):
        return a < b if sign == "<" else a > b
    return None


def _matches(value: str, pattern: str) -> bool:
    import fnmatch

    return value == pattern or fnmatch.fnmatchcase(value, pattern)


def _edited(value: str, sign: str, pattern: str) -> str:
    """`${X%pattern}`, `${X#pattern}`, `${X/a/b}`, `${X:offset:length}`, `${X,,}`, `${X^^}`."""
    if sign in (",,", "^^"):
        return value.lower() if sign == ",," else value.upper()
    if sign == ":":
        offset, _, length = pattern.partition(":")
        try:
            begin = int(offset)
            return value[begin : begin + int(length)] if length else value[begin:]
        except ValueError:
            return value
    if sign in ("/", "//"):
        old, _, new = pattern.partition("/")
        return value.replace(old, new) if sign == "//" else value.replace(old, new, 1)
    import fnmatch

    cuts = range(len(value) + 1)
    if sign in ("#", "##"):
        order = cuts if sign == "#" else reversed(cuts)
        return next((value[i:] for i in order if fnmatch.fnmatchcase(value[:i], pattern)), value)
    order = reversed(cuts) if sign == "%" else cuts
    return next((value[:i] for i in order if fnmatch.fnmatchcase(value[i:], pattern)), value)
