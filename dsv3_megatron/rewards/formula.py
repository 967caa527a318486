"""A small language of mathematics, from text to sympy's objects: nothing of a model's answer is ever evaluated.

Decimal numbers, names, + - * / ^, some functions, LaTeX's usual forms of these; length, depth, digits and exponents are
bounded, so that neither `__import__` nor 9**9**9**9 is anything.
"""

import re
from typing import Any

__all__ = ["MAX_CHARACTERS", "NotMath", "has_operators", "parse", "plain_text"]

MAX_CHARACTERS = 500
MAX_DEPTH = 40
MAX_DIGITS = 60
MAX_EXPONENT = 200


class NotMath(ValueError):
    """A text that is not of the language."""


_SPACING = re.compile(r"\\(?:left|right|,|;|!|:|quad|qquad|displaystyle|big|Big|limits)(?![a-zA-Z])|~")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")


def plain_text(text: str) -> str:
    """Without what says nothing: dollars, spaces, a final full stop, \\left, units of angle, thousands' commas."""
    text = text.strip().strip("$").strip()
    for before, after in (
        (r"\(", ""), (r"\)", ""), (r"\[", ""), (r"\]", ""), (r"\$", ""), ("$", ""), (r"\%", ""), ("%", ""),
        (r"^\circ", ""), (r"^{\circ}", ""), ("°", ""), ("−", "-"), ("×", "*"), ("·", "*"), ("÷", "/"), ("π", r"\pi"),
        ("∞", r"\infty"), ("√", r"\sqrt "),
        (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cdot", "*"), (r"\times", "*"), (r"\div", "/"),
    ):  # fmt: skip
        text = text.replace(before, after)
    text = _SPACING.sub(" ", text)
    text = _TEXT.sub(r" \1 ", text)
    text = re.sub(
        r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])", lambda found: found[0].replace(",", ""), text
    )
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


def has_operators(text: str) -> bool:
    return bool(re.search(r"[-+*/^\\=_]", text)) or len(text) == 1


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.\d*|\.\d+|\d+)|(?P<command>\\[a-zA-Z]+|\\[{}])|(?P<name>[a-zA-Z]+)"
    r"|(?P<sign>\*\*|[-+*/^(){}\[\],=!_|;]))",
    re.ASCII,
)
_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan",
              "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "abs")  # fmt: skip
_SYMPY = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "abs": "Abs"}
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho", "tau",
          "epsilon")  # fmt: skip
_OPEN, _CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")


def parse(text: str) -> Any:
    """A text as a sympy expression, or as ("()" | "[]" | "[)" … | "{}" | "=", members).

    Raises:
        NotMath: it is not of the language, or over its bounds.
    """
    plain = plain_text(text)
    if not plain or len(plain) > MAX_CHARACTERS:
        raise NotMath("empty, or too long")
    return _Parser(plain).whole()


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str):
        import sympy

        self.sympy = sympy
        self.tokens: list[tuple[str, str]] = []
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if not match:
                raise NotMath(f"{text[place : place + 10]!r}")
            assert match.lastgroup is not None
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            place = match.end()
            while place < len(text) and text[place] == " ":
                place += 1
        self.place = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        found = self.peek()
        if not found or (wanted is not None and found != wanted):
            raise NotMath(f"{wanted or 'more'} expected")
        self.place += 1
        return found

    def whole(self) -> Any:
        members = [self.relation()]
        while self.peek() in (",", ";"):
            self.take()
            members.append(self.relation())
        if self.peek():
            raise NotMath(f"{self.peek()!r} is left over")
        return members[0] if len(members) == 1 else ("{}", members)

    def relation(self) -> Any:
        left = self.sum()
        if self.peek() != "=":
            return left
        self.take()
        right = self.sum()
        if isinstance(left, tuple) or isinstance(right, tuple):
            return right  # S = {1, 2}
        return right if left.is_Symbol and right.is_number else ("=", [left, right])

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMath("too deep")
        total = self.product()
        while self.peek() in ("+", "-"):
            negative = self.take() == "-"
            other = self.product()
            total = _number(total) - _number(other) if negative else _number(total) + _number(other)
        self.depth -= 1
        return total

    def product(self) -> Any:
        total = self.signed()
        while True:
            if self.peek() == "*":
                self.take()
                total = _number(total) * _number(self.signed())
            elif self.peek() == "/":
                self.take()
                divisor = _number(self.signed())
                if divisor == 0:
                    raise NotMath("division by zero")
                total = _number(total) / divisor
            elif not isinstance(total, tuple) and self.starts_factor():
                if self.tokens[self.place - 1][0] == "number" and self.kind() == "number":
                    raise NotMath("two numbers side by side")
                if self.mixed():
                    whole = total
                    total = whole + self.power() if whole >= 0 else whole - self.power()
                else:
                    total = total * _number(self.power())
            else:
                return total

    def mixed(self) -> bool:
        r"""1\frac{2}{3}: a mixed number."""
        return self.tokens[self.place - 1][0] == "number" and self.peek() == r"\frac"

    def starts_factor(self) -> bool:
        return self.kind() in ("number", "name") or self.peek() in ("(",) or (
            self.kind() == "command" and self.peek() not in (r"\}", r"\cup", r"\cap", r"\in")
            and self.peek() != r"\{"
        )  # fmt: skip

    def signed(self) -> Any:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        return -_number(value) if negative else value

    def power(self) -> Any:
        base = self.atom()
        while self.peek() == "!":
            self.take()
            if not (getattr(base, "is_Integer", False) and 0 <= base <= 50):
                raise NotMath("factorial")
            base = self.sympy.factorial(base)
        if self.peek() not in ("^", "**"):
            return base
        self.take()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMath("too deep")
        exponent = self.group() if self.peek() in ("{", "(") else self.signed()
        self.depth -= 1
        exponent = _number(exponent)
        if not exponent.free_symbols and abs(complex(exponent.evalf(5))) > MAX_EXPONENT:
            raise NotMath("exponent")
        return _bounded(_number(base) ** exponent)

    def group(self) -> Any:
        """{…} or (…) with one value; or a single token, as in \\frac12."""
        if self.peek() in ("{", "("):
            opening = self.take()
            value = self.sum()
            self.take("}" if opening == "{" else ")")
            return value
        if self.kind() == "number" and len(self.peek()) > 1 and self.peek().isdigit():
            self.tokens[self.place : self.place + 1] = [("number", digit) for digit in self.peek()]
        return self.atom()

    def atom(self) -> Any:
        kind, word = self.kind(), self.peek()
        if kind == "number":
            self.take()
            if len(word) > MAX_DIGITS:
                raise NotMath("too many digits")
            return self.sympy.Rational(word)
        if kind == "name":
            self.take()
            return self.named(word)
        if word == "|":
            self.take()
            value = self.sum()
            self.take("|")
            return self.sympy.Abs(_number(value))
        if word in _OPEN:
            return self.bracket()
        if kind == "command":
            self.take()
            return self.command(word[1:])
        raise NotMath(f"{word!r}")

    def named(self, word: str) -> Any:
        if word in _FUNCTIONS:
            return self.function(word)
        constants = {
            "pi": self.sympy.pi,
            "e": self.sympy.E,
            "i": self.sympy.I,
            "oo": self.sympy.oo,
            "infty": self.sympy.oo,
        }
        if word in constants:
            return constants[word]
        if len(word) == 1 or word in _GREEK:
            name = word
            if self.peek() == "_":
                self.take()
                index = str(self.group()) if self.peek() == "{" else self.take()
                name = f"{word}_{index}"
            return self.sympy.Symbol(name)
        if len(word) <= 3:  # xy is x·y
            product = self.sympy.Integer(1)
            for letter in word:
                product *= self.named(letter)
            return product
        raise NotMath(f"the word {word!r}")

    def function(self, word: str) -> Any:
        exponent = None
        if self.peek() == "^":
            self.take()
            exponent = _number(self.group())
        base = None
        if word == "log" and self.peek() == "_":
            self.take()
            base = _number(self.group())
        root = None
        if word == "sqrt" and self.peek() == "[":
            self.take()
            root = _number(self.sum())
            self.take("]")
        argument = _number(self.group() if self.peek() in ("{", "(") or word == "sqrt" else self.power())
        if word == "sqrt":
            value = argument ** (1 / (root if root is not None else self.sympy.Integer(2)))
        elif base is not None:
            value = self.sympy.log(argument) / self.sympy.log(base)
        else:
            value = getattr(self.sympy, _SYMPY.get(word, word))(argument)
        return value if exponent is None else value**exponent

    def command(self, word: str) -> Any:
        if word == "frac":
            top, bottom = _number(self.group()), _number(self.group())
            if bottom == 0:
                raise NotMath("division by zero")
            return top / bottom
        if word == "binom":
            top, bottom = _number(self.group()), _number(self.group())
            if not (top.is_Integer and bottom.is_Integer and abs(top) <= MAX_EXPONENT):
                raise NotMath("binom")
            return self.sympy.binomial(top, bottom)
        if word in ("emptyset", "varnothing"):
            return ("{}", [])
        return self.named(word)

    def bracket(self) -> Any:
        opening = self.take()
        if opening == r"\{" and self.peek() == r"\}":
            self.take()
            return ("{}", [])
        members = [self.relation()]
        while self.peek() in (",", ";"):
            self.take()
            members.append(self.relation())
        closing = self.take()
        if closing not in _CLOSE:
            raise NotMath(f"{closing!r}")
        if r"\{" in (opening, closing) or r"\}" in (opening, closing):
            if (opening, closing) != (r"\{", r"\}"):
                raise NotMath("unbalanced")
            return ("{}", members)
        if len(members) == 1:
            if opening + closing not in ("()", "{}", "[]"):
                raise NotMath("unbalanced")
            return members[0]
        if "{" in opening + closing or "}" in opening + closing:
            if opening + closing != "{}":
                raise NotMath("unbalanced")
            return ("{}", members)
        return (opening + closing, members)


def _number(value: Any) -> Any:
    """A value that can be reckoned with, no tuple."""
    if isinstance(value, tuple):
        raise NotMath("a list in an expression")
    return value


def _bounded(value: Any) -> Any:
    """Not a number of thousands of digits."""
    if getattr(value, "is_Rational", False) and max(abs(value.p), value.q).bit_length() > 20_000:
        raise NotMath("too large")
    return value
