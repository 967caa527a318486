"""Words as a shell expands them: variables, arrays, arithmetic, the output of plain commands."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv3_megatron.adopt import zoo
from dsv3_megatron.adopt.arithmetic import evaluate
from dsv3_megatron.adopt.strings import as_list, edited, unquoted
from dsv3_megatron.adopt.tokens import Token, end_of_expansion

__all__ = ["Expander"]


class Expander:
    """Expands words; what is not known stays in them as `${NAME}`.

    Attributes:
        variables: by name; `NAME[KEY]` for entries of associative arrays.
        arguments: `$1`, `$2`, …
        file: where `$0` points to.
        assigned: names that the file sets somewhere; where it has not, they are empty.
        aliases: what `declare -n` calls another name.
    """

    def __init__(self, variables: dict[str, str | list[str]], file: Path, arguments: list[str]) -> None:
        self.variables, self.file, self.arguments = variables, file, arguments
        self.assigned: set[str] = set()
        self.aliases: dict[str, str] = {}

    def words(self, words: Sequence[Token]) -> list[str]:
        found: list[str] = []
        for word in words:
            found += self._fields(word)
        return found

    def _fields(self, word: Token) -> list[str]:
        """One word expanded: split at white space where it is not quoted."""
        fields: list[str] = []
        pending: str | None = None
        nothing = False  # an array without items
        for text, mode in word.pieces:
            if mode == "literal":
                pending = (pending or "") + text
                continue
            array = re.fullmatch(r"\$\{(\w+)\[[@*]\]\}|\$[@*]", text)
            if array and mode in ("quoted", "bare"):
                items = self.arguments if array[1] is None else as_list(self.variables.get(array[1], []))
                if text in ("$*",) or text.endswith("[*]}"):
                    items = [" ".join(items)] if mode == "quoted" else items
                if mode == "bare":
                    items = [part for item in items for part in item.split()]
                nothing = nothing or not items
                for i, item in enumerate(items):
                    if i and pending is not None:
                        fields.append(pending)
                        pending = None
                    pending = (pending or "") + item
                continue
            value = self.expand_text(text)
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
        if pending is not None and not (nothing and pending == ""):  # "$@" of no arguments is no word
            fields.append(pending)
        return fields

    def text(self, word: Token) -> str:
        """One word expanded without being split."""
        return "".join(text if mode == "literal" else self.expand_text(text) for text, mode in word.pieces)

    def expand_text(self, text: str) -> str:
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
            value = evaluate(self.expand_text(text[3:-2]), self.number)
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
            value = self.expand_text(match[2].strip().strip("\"'"))
            if "${" not in value:
                return value
        return "${" + re.sub(r"\W+", "_", inner.strip())[:24].strip("_") + "}"

    def _place(self, inner: str) -> str | None:
        """The usual ways to find the script's own folder, and `dirname` of a known path."""
        levels = len(re.findall(r"\bdirname\b", inner))
        if re.search(r"\$0|\$\{?BASH_SOURCE", inner):
            path = self.file
        else:
            words = self.expand_text(
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
        # `envsubst < F > F.tmp` comes before: its copy is not there, and variables are replaced here.
        names = [
            self.expand_text(word).removesuffix(".tmp")
            for word in inner.split()
            if "$" in word or "." in word
        ]
        path = next(
            (Path(n) for n in reversed(names) if n.endswith((".yaml", ".yml")) and Path(n).is_file()), None
        )
        if path is None:
            return None
        single = re.search(r'MODEL_ARGS\."(--[\w-]+)"', inner)
        table = {k: self.expand_text(v) for k, v in zoo.model_arguments(path).items()}
        return table.get(single[1], "null") if single else " ".join(zoo.words(table))

    def _parameter(self, text: str) -> str:
        if text.startswith("#"):
            items = (
                self.arguments if text[1:] in ("@", "*") else self.variables.get(text[1:].partition("[")[0])
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
        known = value != unknown and (value != "" or self.aliases.get(name, name) in self.variables)
        if not sign:
            return value
        if sign in (":-", "-", ":=", "="):
            use_default = not known or (sign.startswith(":") and value == "")
            result = self.expand_text(unquoted(rest)) if use_default else value
            if sign.endswith("=") and use_default:
                self.variables[name] = result
            return result
        if sign in (":+", "+"):
            return self.expand_text(unquoted(rest)) if known and (value or sign == "+") else ""
        if not known or sign in (":?", "?"):
            return value
        return edited(value, sign, self.expand_text(unquoted(rest)))

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
        variables = self.variables
        if index:
            key = self.expand_text(index.rstrip("]"))
            if f"{base}[{key}]" in variables:
                return str(variables[f"{base}[{key}]"])
            items = variables.get(base)
            if items is None:
                return "" if base in self.assigned else unknown
            if key in ("@", "*"):
                return " ".join(as_list(items))
            position = evaluate(key, self.number)
            listed = as_list(items)
            return listed[position] if position is not None and -len(listed) <= position < len(listed) else ""
        value = variables.get(base)
        if value is None:
            if base in self.assigned:
                return ""
            return unknown if unknown.startswith("${") else "${" + base + "}"
        return (value[0] if value else "") if isinstance(value, list) else value

    def number(self, name: str) -> int | None:
        value = self._value(name, "")
        return int(value) if re.fullmatch(r"-?\d+", value) else None
