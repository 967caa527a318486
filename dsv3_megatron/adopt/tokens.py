"""Words and operators of a shell script, as far as launch scripts use them."""

import re
from dataclasses import dataclass, field

__all__ = ["REDIRECTIONS", "Token", "end_of_expansion", "tokens"]

# A piece of a word and how it is read: "literal", an expansion in double "quoted" text, or a "bare" one.
Piece = tuple[str, str]

_OPERATORS = (
    "&&",
    "||",
    ";;",
    "<<<",
    "<<-",
    "<<",
    ">>",
    "&>",
    ">&",
    "<&",
    ">|",
    ";",
    "&",
    "|",
    "(",
    ")",
    "<",
    ">",
)
REDIRECTIONS = ("<", ">", ">>", "&>", ">&", "<&", ">|", "<<<")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*(?:\[[^\]]*\])?)(\+?=)")


@dataclass
class Token:
    """A word or an operator.

    Attributes:
        text: as it stands in the script.
        line: where.
        pieces: of a word.
        operator: it is `;`, `|`, a line's end, …
        quoted: some of it stands in quotes.
        items: the words in the parentheses of an array that is assigned.
        documents: here-documents that begin on its line, for operators `<<`.
        start, end: place in the text.
    """

    text: str
    line: int
    pieces: list[Piece] = field(default_factory=list)
    operator: bool = False
    quoted: bool = False
    items: "list[Token] | None" = None
    document: str | None = None
    start: int = 0
    end: int = 0
    source: str = ""

    def assignment(self) -> "tuple[str, str, list[Token] | Token] | None":
        """(name, `=` or `+=`, value) of `NAME=VALUE`."""
        match = _ASSIGNMENT.match(self.text) if not self.operator else None
        if match is None or not self.pieces or not self.pieces[0][0].startswith(match[0]):
            return None
        if self.items is not None:
            return match[1], match[2], self.items
        first, mode = self.pieces[0]
        value = Token(
            self.text[len(match[0]) :], self.line, [(first[len(match[0]) :], mode), *self.pieces[1:]]
        )
        return match[1], match[2], value


def tokens(text: str, first_line: int = 1) -> list[Token]:
    """Cut a script into words and operators.

    Raises:
        ValueError: a quote does not end.
    """
    return _Scanner(text, first_line).scan()


class _Scanner:
    def __init__(self, text: str, line: int) -> None:
        self.text, self.at, self.line = text, 0, line
        self.found: list[Token] = []
        self.waiting: list[tuple[Token, str, bool, bool]] = []  # here-documents whose text follows

    def scan(self, until: str = "") -> list[Token]:
        while self.at < len(self.text):
            char = self.text[self.at]
            if until and char == until:
                self.at += 1
                return self.found
            if self.text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
            elif char == "\n":
                self._operator("\n")
                self.line += 1
                self._documents()
            elif char.isspace():
                self.at += 1
            elif char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text.startswith("((", self.at) and self._at_command():
                self._arithmetic_command()
            else:
                operator = next((o for o in _OPERATORS if self.text.startswith(o, self.at)), None)
                if operator is None:
                    self.found.append(self._word())
                elif operator in ("<<", "<<-"):
                    self._here_document(operator)
                else:
                    self._operator(operator)
        return self.found

    def _at_command(self) -> bool:
        return (
            not self.found
            or self.found[-1].operator
            or self.found[-1].text in ("if", "while", "elif", "then", "!")
        )

    def _operator(self, text: str) -> None:
        self.found.append(
            Token(text, self.line, operator=True, start=self.at, end=self.at + len(text), source=self.text)
        )
        self.at += len(text)

    def _arithmetic_command(self) -> None:
        end = self.text.find("))", self.at)
        if end < 0:
            raise ValueError(f"line {self.line}: (( does not end")
        for text in ("((", self.text[self.at + 2 : end], "))"):
            self.found.append(Token(text, self.line, [(text, "literal")], quoted=True))
        self.line += self.text.count("\n", self.at, end)
        self.at = end + 2

    def _here_document(self, operator: str) -> None:
        self.at += len(operator)
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1
        word = self._word()
        token = Token(operator, self.line, operator=True, document="")
        self.found.append(token)
        self.waiting.append((token, re.sub(r"[\"'\\]", "", word.text), operator == "<<-", word.quoted))

    def _documents(self) -> None:
        """After a line's end: the text of its here-documents."""
        for token, end, indented, raw in self.waiting:
            lines: list[str] = []
            while self.at < len(self.text):
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                line = self.text[self.at : stop]
                self.at, self.line = min(stop + 1, len(self.text)), self.line + 1
                if (line.lstrip("\t") if indented else line).rstrip() == end:
                    break
                lines.append(line)
            text = "\n".join(lines)
            token.document = text if raw else re.sub(r"\\([$`\\])", r"\1", text)
        self.waiting = []

    def _word(self) -> Token:
        token = Token("", self.line, start=self.at, source=self.text)
        literal = ""

        def flush() -> None:
            nonlocal literal
            if literal:
                token.pieces.append((literal, "literal"))
            literal = ""

        while self.at < len(self.text):
            char = self.text[self.at]
            if char.isspace() or (
                char in ";&|()<>" and not (char == "(" and _ends_in_equals(literal, token))
            ):
                break
            if char == "(":  # an array
                flush()
                token.items = self._array()
                break
            if char == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise ValueError(f"line {self.line}: a quote does not end")
                literal += self.text[self.at + 1 : end]
                self.line += self.text.count("\n", self.at, end)
                token.quoted, self.at = True, end + 1
                if not literal:
                    token.pieces.append(("", "literal"))
            elif char == '"':
                flush()
                token.quoted = True
                token.pieces += self._double_quoted()
            elif char == "\\":
                following = self.text[self.at + 1 : self.at + 2]
                if following == "\n":
                    self.line += 1
                else:
                    literal += following
                self.at += 2
            elif char == "$" or char == "`":
                end = self._expansion_end(self.at)
                text = self.text[self.at : end]
                if len(text) > 1:
                    flush()
                    token.pieces.append((text, "bare"))
                else:
                    literal += text
                self.line += text.count("\n")
                self.at = end
            else:
                literal += char
                self.at += 1
        flush()
        token.end = self.at
        token.text = self.text[token.start : token.end]
        return token

    def _array(self) -> list[Token]:
        inner = _Scanner(self.text, self.line)
        inner.at = self.at + 1
        words = [token for token in inner.scan(until=")") if not token.operator]
        self.at, self.line = inner.at, inner.line
        return words

    def _double_quoted(self) -> list[Piece]:
        pieces: list[Piece] = []
        literal, start = "", self.line
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                pieces.append((literal, "literal"))
                return pieces
            if char == "\\":
                following = self.text[self.at + 1 : self.at + 2]
                if following == "\n":
                    self.line += 1
                elif following in '"\\$`':
                    literal += following
                else:
                    literal += char + following
                self.at += 2
            elif char == "$" or char == "`":
                end = self._expansion_end(self.at)
                text = self.text[self.at : end]
                if len(text) > 1:
                    pieces += [(literal, "literal"), (text, "quoted")]
                    literal = ""
                else:
                    literal += text
                self.line += text.count("\n")
                self.at = end
            else:
                self.line += char == "\n"
                literal += char
                self.at += 1
        raise ValueError(f"line {start}: a quote does not end")

    def _expansion_end(self, at: int) -> int:
        return end_of_expansion(self.text, at)


def end_of_expansion(text: str, at: int) -> int:
    """Where the expansion that begins at `at` ends."""
    if text[at] == "`":
        end = text.find("`", at + 1)
        return len(text) if end < 0 else end + 1
    following = text[at + 1 : at + 2]
    if following in ("(", "{"):
        opening, closing = following, {"(": ")", "{": "}"}[following]
        depth = 0
        for i in range(at + 1, len(text)):
            depth += (text[i] == opening) - (text[i] == closing)
            if depth == 0:
                return i + 1
        return len(text)
    match = re.match(r"\$(\w+|[@*#?!$-])", text[at:])
    if match is None:
        return at + 1
    name = match[1]
    if name[0].isdigit():
        return at + 2  # $10 is $1 and a 0
    return at + len(match[0])


def _ends_in_equals(literal: str, token: Token) -> bool:
    return not token.pieces and re.fullmatch(r"[A-Za-z_]\w*\+?=", literal) is not None


# --- statements
