"""Statements of a shell script, as far as launch scripts use them."""

from collections.abc import Sequence

from dsv3_megatron.adopt.tokens import REDIRECTIONS, Token

__all__ = ["statements"]


def statements(found: Sequence[Token]) -> list:
    """Statements as nested tuples: ("simple", words, documents), ("if", branches, otherwise), ("for", name, words,
    body), ("while", condition, body), ("case", subject, branches), ("function", name, text)."""
    return _Parser(list(found)).block(())


class _Parser:
    def __init__(self, found: list[Token]) -> None:
        self.tokens, self.at = found, 0

    def _next(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _word(self) -> str:
        token = self._next()
        return "" if token is None or token.operator or token.quoted else token.text

    def _skip_ends(self) -> None:
        while (
            (token := self._next()) is not None
            and token.operator
            and token.text in ("\n", ";", "&", "(", ")")
        ):
            self.at += 1

    def block(self, ends: tuple[str, ...]) -> list:
        """Statements up to one of the words in `ends`, which is not taken."""
        found: list = []
        while True:
            self._skip_ends()
            token = self._next()
            if token is None or (self._word() in ends) or (token.operator and token.text in ends):
                return found
            statement = self._statement()
            if statement is not None:
                found.append(statement)

    def _statement(self):
        word = self._word()
        if word == "if":
            return self._if()
        if word in ("while", "until"):
            self.at += 1
            condition = self._condition(("do",))
            return "while", condition, self._body("do", "done")
        if word == "for":
            return self._for()
        if word == "case":
            return self._case()
        if word in (
            "{",
            "}",
            "!",
            "then",
            "do",
            "done",
            "fi",
            "esac",
            "else",
        ):  # groups are read as what is in them
            self.at += 1
            return None
        if word == "function" or self._is_function():
            return self._function()
        return self._simple()

    def _body(self, begin: str, end: str) -> list:
        if self._word() == begin:
            self.at += 1
        body = self.block((end,))
        self.at += 1
        return body

    def _if(self):
        branches, otherwise = [], []
        while True:
            self.at += 1  # if, elif
            condition = self._condition(("then",))
            self.at += 1
            branches.append((condition, self.block(("elif", "else", "fi"))))
            if self._word() != "elif":
                break
        if self._word() == "else":
            self.at += 1
            otherwise = self.block(("fi",))
        self.at += 1
        return "if", branches, otherwise

    def _condition(self, ends: tuple[str, ...]) -> list:
        """Parts `(negated, words)`, with "&&" or "||" between them."""
        parts: list = []
        while (token := self._next()) is not None and self._word() not in ends:
            if token.operator:
                self.at += 1
                if token.text in ("&&", "||") and parts:
                    parts.append(token.text)
                continue
            negated = self._word() == "!"
            self.at += negated
            words = self._test_words()
            parts.append((negated, words))
        while parts and parts[-1] in ("&&", "||"):
            parts.pop()
        return parts

    def _test_words(self) -> list[Token]:
        """The words of one command in a condition; inside `[[ … ]]` operators are words."""
        first = self._next()  # None behind a `!` that ends the script
        closing = {"[[": "]]", "[": "]", "((": "))"}.get(first.text if first is not None else "")
        words: list[Token] = []
        while (token := self._next()) is not None:
            if token.operator and (closing is None or token.text == "\n"):
                break
            self.at += 1
            if token.operator:
                token = Token(token.text, token.line, [(token.text, "literal")])
            words.append(token)
            if token.text == closing:
                break
        return words

    def _for(self):
        self.at += 1
        name = self._word()
        self.at += 1
        words: list[Token] = []
        if self._word() == "in":
            self.at += 1
            while (token := self._next()) is not None and not token.operator:
                words.append(token)
                self.at += 1
        while self._next() is not None and self._word() != "do":
            self.at += 1
        return "for", name, words, self._body("do", "done")

    def _case(self):
        self.at += 1
        subject = []
        while self._next() is not None and self._word() != "in":
            subject.append(self._next())
            self.at += 1
        self.at += 1
        branches = []
        while True:
            self._skip_ends()
            if self._next() is None or self._word() == "esac":
                self.at += 1
                return "case", subject, branches
            patterns = []
            while (token := self._next()) is not None and not (token.operator and token.text == ")"):
                if not token.operator:
                    patterns.append(token)
                self.at += 1
            self.at += 1
            body = self.block((";;", "esac"))
            if (token := self._next()) is not None and token.text == ";;":
                self.at += 1
            branches.append((patterns, body))

    def _is_function(self) -> bool:
        following = self.tokens[self.at + 1 : self.at + 3]
        return len(following) == 2 and [t.text for t in following] == ["(", ")"] and following[0].operator

    def _function(self):
        if self._word() == "function":
            self.at += 1
        name = self._word()
        self.at += 1
        while (token := self._next()) is not None and token.operator:
            self.at += 1
        begin = self._next()
        depth = 0
        while (token := self._next()) is not None:
            depth += (not token.operator and token.text == "{") - (not token.operator and token.text == "}")
            self.at += 1
            if depth == 0:
                break
        if begin is None or token is None:
            return None
        return "function", name, begin.source[begin.end : token.start]

    def _simple(self):
        words: list[Token] = []
        documents: list[str] = []
        while (token := self._next()) is not None:
            if not token.operator:
                following = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
                redirected = (
                    token.text.isdigit() and following is not None and following.operator
                    and following.text in REDIRECTIONS and following.start == token.end
                )  # fmt: skip
                if not redirected:
                    words.append(token)
                self.at += 1
                continue
            if token.document is not None:
                documents.append(token.document)
                self.at += 1
            elif token.text in REDIRECTIONS:
                self.at += 2  # and the file
            elif token.text in ("(",) and words and words[-1].text.startswith("$"):
                self.at += 1
            else:
                break
        if (token := self._next()) is not None and token.text in ("&&", "||", "|"):
            self.at += 1
        return ("simple", words, documents) if words else None
