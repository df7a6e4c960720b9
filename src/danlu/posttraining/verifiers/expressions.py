"""Numbers and simple algebra out of an answer, compared exactly: ``1/2``, ``0.5``, ``50%`` and ``\\frac{1}{2}`` are the
same, and so are ``2x + 1`` and ``1 + x*2``.

A parser of its own reads the few operations there are, and everything is bounded before it is computed: nothing is
evaluated that could run, and ``9**9**9`` is refused, not tried. Values are quotients of polynomials with rational
coefficients, which are equal when their cross products are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 500
MAX_TOKENS = 200
MAX_DEPTH = 30
MAX_BITS = 4096
MAX_EXPONENT, MAX_TERMS = 30, 60
"""Of polynomials, so that the worst of what the other bounds let through takes a fraction of a second."""

Monomial = tuple[tuple[str, int], ...]
"""Names with their exponents, sorted; () stands for 1."""
Polynomial = dict[Monomial, Fraction]


class UnreadableError(Exception):
    """It is no expression that is known here, or too large a one."""


@dataclass(frozen=True)
class Value:
    """A quotient of polynomials. ``percent``: a number that was written with a percent sign, which is counted in."""

    top: Polynomial
    bottom: Polynomial
    percent: bool = False

    def equals(self, other: Value) -> bool:
        """Whether both are the same wherever they are defined."""
        return _times(self.top, other.bottom) == _times(other.top, self.bottom)

    def of_hundred(self) -> Value:
        """The number before the percent sign, where there was one."""
        return _multiply(self, _number(Fraction(100))) if self.percent else self


def read_expression(text: str) -> Value:
    """A number or an expression, in plain writing or in LaTeX.

    Raises:
        UnreadableError: it is neither, or beyond the bounds.
    """
    if len(text) > MAX_CHARS:
        raise UnreadableError(f"has more than {MAX_CHARS} characters")
    tokens = _TOKEN.findall(plain(text))
    if not tokens or len(tokens) > MAX_TOKENS:
        raise UnreadableError("is empty" if not tokens else f"has more than {MAX_TOKENS} numbers and signs")
    return _Parser(tokens).whole()


def plain(text: str) -> str:
    r"""LaTeX and typography as plain signs: ``\frac{a}{b}`` as ``((a)/(b))``, ``\cdot`` as ``*``, ``1,234`` as 1234."""
    text = re.sub(
        r"\\(?:left|right|displaystyle|,|!|;|:|\s|quad)|\\?\$|\\\(|\\\)|\\\[|\\\]|°|\^\{?\\circ\}?", " ", text
    )
    text = re.sub(r"\\(?:text|mathrm|mbox|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = text.replace("\\%", "%").replace("−", "-").replace("–", "-").replace("×", "*").replace("÷", "/")
    text = text.replace("·", "*").replace("²", "^2").replace("³", "^3").replace("π", " pi ").replace("\\pi", " pi ")
    text = re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text)
    text = re.sub(r"\\div(?![a-z])", "/", text)
    text = plain_thousands(text)
    text = re.sub(r"(?<![\w.)}])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)", text)  # 1 1/2
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"((\1)/(\2))", text)
    for _ in range(MAX_DEPTH):  # the innermost first
        text, n = re.subn(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text, m = re.subn(r"(\^|\\sqrt)\s*\{([^{}]*)\}", r"\1(\2)", text)
        if not n + m:
            break
    return (
        text.replace("\\sqrt", "sqrt")
        .replace("√", "sqrt")
        .replace("{", "(")
        .replace("}", ")")
        .strip()
        .rstrip(".")
        .strip()
    )


def plain_thousands(text: str) -> str:
    """``1,234,567`` without its commas."""
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda found: found[0].replace(",", ""), text)


_TOKEN = re.compile(r"\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?![\w.]))?|\.\d+|\*\*|sqrt|pi|[A-Za-z]+|\S")


class _Parser:
    """Recursive descent: sums of products of powers. Two values side by side are multiplied."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0

    def whole(self) -> Value:
        value = self._sum()
        if self._next() is not None:
            raise UnreadableError(f"has a {self._next()!r} that is not understood")
        return value

    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self, *wanted: str) -> str | None:
        token = self._next()
        if token is None or token not in wanted:
            return None
        self._at += 1
        return token

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError("is nested too deeply")
        value = self._product()
        while (sign := self._take("+", "-")) is not None:
            other = self._product()
            value = _add(value, other if sign == "+" else _negative(other))
        self._depth -= 1
        return value

    def _product(self) -> Value:
        value = self._signed()
        while (token := self._next()) is not None:
            if self._take("*"):
                value = _multiply(value, self._signed())
            elif self._take("/"):
                value = _divide(value, self._signed())
            elif token == "(" or token.isalpha():
                value = _multiply(value, self._power())
            else:
                break
        return value

    def _signed(self) -> Value:
        negative = False
        while (sign := self._take("+", "-")) is not None:
            negative ^= sign == "-"
        value = self._power()
        return _negative(value) if negative else value

    def _power(self) -> Value:
        value = self._atom()
        if self._take("^", "**"):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise UnreadableError("is nested too deeply")
            exponent = self._signed()
            self._depth -= 1
            value = _power(value, exponent)
        if self._take("%"):
            value = _multiply(value, _number(Fraction(1, 100)))
            value = Value(value.top, value.bottom, percent=True)
        return value

    def _atom(self) -> Value:
        token = self._next()
        if token is None:
            raise UnreadableError("ends too early")
        self._at += 1
        if token[0].isascii() and (token[0].isdigit() or (token[0] == "." and len(token) > 1)):
            return _number(_read_number(token))
        if token == "(":
            value = self._sum()
            if not self._take(")"):
                raise UnreadableError("has a bracket that is not closed")
            return value
        if token == "sqrt":
            return _square_root(self._atom())
        if token == "pi" or (len(token) == 1 and token.isalpha()):
            return Value({((token, 1),): Fraction(1)}, {(): Fraction(1)})
        raise UnreadableError(f"has {token[:20]!r} in it, which is not understood")


def _read_number(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    if len(mantissa) > 300 or abs(int(exponent or 0)) > 300:
        raise UnreadableError("has too large a number")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _number(value: Fraction) -> Value:
    return Value(_polynomial({(): value}), {(): Fraction(1)})


def _polynomial(terms: Polynomial) -> Polynomial:
    """Without what cancels out, and not too large."""
    terms = {monomial: c for monomial, c in terms.items() if c}
    if len(terms) > MAX_TERMS:
        raise UnreadableError(f"has more than {MAX_TERMS} terms when multiplied out")
    for monomial, c in terms.items():
        if max(c.numerator.bit_length(), c.denominator.bit_length()) > MAX_BITS:
            raise UnreadableError("has too large a number")
        if sum(exponent for _, exponent in monomial) > MAX_EXPONENT:
            raise UnreadableError("has too high a power")
    return terms


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return _polynomial({m: a.get(m, Fraction()) + b.get(m, Fraction()) for m in a.keys() | b.keys()})


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for m, c in a.items():
        for n, d in b.items():
            exponents = dict(m)
            factor = c * d
            for name, exponent in n:
                exponents[name] = exponents.get(name, 0) + exponent
            for name in [name for name in exponents if name.startswith("√")]:  # √2 √2 = 2
                factor *= int(name[1:]) ** (exponents[name] // 2)
                exponents[name] %= 2
            key = tuple(sorted((name, exponent) for name, exponent in exponents.items() if exponent))
            product[key] = product.get(key, Fraction()) + factor
        _polynomial(product)
    return _polynomial(product)


def _add(a: Value, b: Value) -> Value:
    if a.bottom == b.bottom:
        return Value(_plus(a.top, b.top), a.bottom)
    return Value(_plus(_times(a.top, b.bottom), _times(b.top, a.bottom)), _times(a.bottom, b.bottom))


def _negative(a: Value) -> Value:
    return Value({m: -c for m, c in a.top.items()}, a.bottom, a.percent)


def _multiply(a: Value, b: Value) -> Value:
    return Value(_times(a.top, b.top), _times(a.bottom, b.bottom))


def _divide(a: Value, b: Value) -> Value:
    if not b.top:
        raise UnreadableError("divides by zero")
    return Value(_times(a.top, b.bottom), _times(a.bottom, b.top))


def _constant(value: Value) -> Fraction | None:
    if any(polynomial.keys() - {()} for polynomial in (value.top, value.bottom)):
        return None
    return value.top.get((), Fraction()) / value.bottom[()]


def _power(base: Value, exponent: Value) -> Value:
    number, constant = _constant(exponent), _constant(base)
    if number == Fraction(1, 2):
        return _square_root(base)
    if number is None or number.denominator != 1:
        raise UnreadableError("has a power that is not a whole number")
    if number < 0:
        return _divide(_number(Fraction(1)), _power(base, _negative(exponent)))
    if constant is not None:
        bits = max(constant.numerator.bit_length(), constant.denominator.bit_length())
        if number * bits > MAX_BITS:
            raise UnreadableError("has too large a number")
        return _number(constant ** int(number))
    if number > MAX_EXPONENT:
        raise UnreadableError("has too high a power")
    result = _number(Fraction(1))
    for _ in range(int(number)):
        result = _multiply(result, base)
    return result


def _square_root(value: Value) -> Value:
    """Of a number that is not negative: its square factors are drawn out, and √ of the rest is a name of its own."""
    number = _constant(value)
    if number is None or number < 0 or max(number.numerator, number.denominator) > 10**8:
        raise UnreadableError("has a root of something else than a small number")
    rest = number.numerator * number.denominator  # √(p/q) = √(pq)/q
    outside, factor = Fraction(1, number.denominator), 2
    while factor * factor <= rest and factor < 10**4:
        while rest % (factor * factor) == 0:
            rest //= factor * factor
            outside *= factor
        factor += 1
    if rest == 0:
        return _number(Fraction())
    root: Polynomial = {(): outside} if rest == 1 else {((f"√{rest}", 1),): outside}
    return Value(root, {(): Fraction(1)})
