"""Whether the last result of an answer is the one that the row expects.

The result is what stands in the last ``\\boxed{}``, else behind the last ``####``, else behind the last "answer is" or
"answer:", else the last formula in LaTeX, where no number comes after it, else the last number. Numbers and expressions
are compared exactly (``expressions.py``; 0.33 is not 1/3), lists and tuples one by one, and what is neither letter by
letter, without case and spaces.
"""

from __future__ import annotations

import re

from danlu.posttraining.verifiers.base import OneByOne, Sample, Verdict, text_field, without_thoughts
from danlu.posttraining.verifiers.expressions import UnreadableError, Value, plain_thousands, read_expression

MAX_ANSWER = 100_000
"""Characters at the end of an answer that are looked at."""
MAX_RESULT = 1000
"""Characters; longer ones are only compared letter by letter."""
MAX_PARTS = 20

SAID = re.compile(r"answer(?:\s+is|\s*:|\s*=)[\s:=*]*([^\n]+)", re.IGNORECASE)
NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d{1,3}\b)?(?:\s*/\s*\d+(?:\.\d+)?)?\s*\\?%?"
)

FORMULA = re.compile(r"\$([^$\n]+)(?=\$)")
"""Only with a command of LaTeX in it: other dollars may be a currency."""


class MathEqual(OneByOne):
    """1 where the answer's result is the expected one, else 0.

    Args:
        field: of the row that holds the expected answer; a worked solution may stand before the result.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    def one(self, sample: Sample) -> Verdict:
        wanted = text_field(sample.row, self._field)
        marked = result_of(wanted, only_marked=True)
        wanted = wanted.strip() if marked is None else marked
        if not wanted:
            return Verdict(None, f"the row's field {self._field!r} is empty")
        result = result_of(without_thoughts(sample.answer))
        if result is None:
            return Verdict(0.0, "gives no result")
        if same(result, wanted):
            return Verdict(1.0)
        return Verdict(0.0, f"gives {result[:100]!r}, not {wanted[:100]!r}")


def result_of(text: str, only_marked: bool = False) -> str | None:
    r"""The result that a text ends in; None where it has none.

    Args:
        only_marked: by ``\boxed`` or ``####``.
    """
    text = text[-MAX_ANSWER:]
    if (boxed := last_boxed(text)) is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    if only_marked:
        return None
    said: list[str] = SAID.findall(text)
    if said:
        return said[-1].strip("*_`. \t")
    numbers, formulas = [*NUMBER.finditer(text)], [one for one in FORMULA.finditer(text) if "\\" in one[1]]
    if formulas and not (numbers and numbers[-1].start() >= formulas[-1].end()):
        return formulas[-1][1].strip()
    return numbers[-1][0].strip() if numbers else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` or ``\fbox{}``, brackets in it balanced; None without one."""
    starts = [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not starts:
        return None
    depth = 1
    for place in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[starts[-1] : place].strip()
    return None  # cut off


def same(result: str, wanted: str) -> bool:
    """Whether two results are equal."""
    if _bare(result) == _bare(wanted):
        return True
    if max(len(result), len(wanted)) > MAX_RESULT:
        return False
    ours, theirs = _parts(result), _parts(wanted)
    if len(ours) > 1 or len(theirs) > 1:
        # The brackets of an interval tell something, unless one side has none.
        brackets = {text[0] + text[-1] for text in map(_bare, (result, wanted)) if re.fullmatch(r"[(\[].*[)\]]", text)}
        return len(ours) == len(theirs) and len(brackets) < 2 and all(map(same, ours, theirs))
    try:
        numbers = NUMBER.findall(wanted)
        expected = _value(wanted, numbers[0] if len(numbers) == 1 else None)
        value = _value(result, next(iter(NUMBER.findall(result)), None))
        # "What percentage" is answered with 50 as well as with 50%.
        return value.equals(expected) or (
            value.percent != expected.percent and value.of_hundred().equals(expected.of_hundred())
        )
    except UnreadableError:
        return False


def _value(text: str, number: str | None) -> Value:
    """The value of an expression; where the text is none ("18 dollars a week"), of a number in it."""
    try:
        return read_expression(_right_side(text))
    except UnreadableError:
        if number is None or not re.search(r"[^\W\d_]{2}", text):
            raise
        return read_expression(number)


def _bare(text: str) -> str:
    """Without spaces, case and what only decorates."""
    text = re.sub(r"\\(?:text|mathrm|mbox|mathbf)\s*\{([^{}]*)\}|\\left|\\right|[$*`\s]", r"\1", text)
    return text.casefold().rstrip(".")


def _parts(text: str) -> list[str]:
    """What commas and semicolons divide, but for those of thousands and within brackets; the outermost brackets off."""
    text = re.sub(r"\\left|\\right|\\([{}])", r"\1", plain_thousands(text.strip().strip("$").rstrip(".")))
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}") and _closes_at_end(text):
        text = text[1:-1]
    parts, depth = [""], 0
    for sign in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign, 0)
        if sign in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts] if 1 < len(parts) <= MAX_PARTS and all(map(str.strip, parts)) else [text]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign, 0)
        if depth == 0:
            return place == len(text) - 1
    return False


def _right_side(text: str) -> str:
    r"""Of ``x = 5`` what x is; without a unit in ``\text{}``."""
    text = re.sub(r"(?<=[\d})])\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*\$?\.?$", "", text.strip())
    return re.sub(r"^\s*[$(\\\[]*\s*[A-Za-z](?:_\w|\(\w\))?\s*=(?!=)", "", text)
