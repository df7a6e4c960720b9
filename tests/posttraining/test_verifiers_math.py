"""Field note 15: a verifier is an attack surface. What is equal, what is not, and what must not hang."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.posttraining.verifiers.base import Sample
from danlu.posttraining.verifiers.expressions import UnreadableError, read_expression
from danlu.posttraining.verifiers.math_equal import MathEqual, result_of, same


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("1/2", "0.5"),
        (".5", r"\dfrac12"),
        ("50%", "0.5"),
        ("50%", "50"),
        (r"50\%", "50%"),
        ("1,234", "1234"),
        ("1,000,000.00", "10^6"),
        ("1e3", "1000"),
        ("-3", "−3"),
        ("-2^2", "-4"),
        ("2^3^2", "512"),
        ("1 - 2 - 3", "-4"),
        ("8/4/2", "1"),
        ("2(3)", "6"),
        ("2x+1", "1 + x*2"),
        ("(x+1)^2", "x^2+2x+1"),
        ("(x^2-1)/(x-1)", "x+1"),
        ("x^{-1}", "1/x"),
        (r"\frac{\frac{1}{2}}{2}", "1/4"),
        (r"1\frac{1}{2}", "1.5"),
        (r"\sqrt{8}", r"2\sqrt2"),
        (r"1/\sqrt{2}", r"\frac{\sqrt{2}}{2}"),
        ("4^(1/2)", "2"),
        (r"2\pi r", "r * 2π"),
        ("x = 5", "5"),
        ("$18$", "18"),
        (r"\$18.00", "18"),
        ("18 dollars", "18"),
        (r"5\text{ cm}", "5"),
        ("(1, 2)", "(1,2)"),
        (r"\left(3, \frac{\pi}{2}\right)", "(3, pi/2)"),
        (r"\text{Monday}", "monday."),
        (r"\{1, 2\}", "{1,2}"),
    ],
)
def test_equal(ours: str, theirs: str) -> None:
    assert same(ours, theirs)
    assert same(theirs, ours)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("0.33", "1/3"),
        ("0.5", "50"),
        ("1", "2"),
        ("5x", "5"),
        ("1,2", "1"),
        ("(1,2)", "(2,1)"),
        ("[0,1)", "(0,1)"),
        ("(1,234)", "1"),
        ("18, 19", "18"),
        ("18 or 19", "19"),
        ("9**9**9", "1"),
        ("9**9**9", "9**9**9 + 1"),
        ("1/0", "1"),
        ("0^-1", "0"),
        ("", "1,2"),
        ("", "1"),
        ("__import__('os').getpid()", "1"),
        ("x.__class__", "x"),
        ("lambda: x", "x"),
    ],
)
def test_not_equal(ours: str, theirs: str) -> None:
    assert not same(ours, theirs)
    assert not same(theirs, ours)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{1", "1"),  # cut off: the last number
        ("3 + 4 = 7\n#### 7\n", "7"),
        ("The answer is **42**. Not 43", "42**. Not 43"),
        ("Answer: -3/4", "-3/4"),
        ("it costs 3, then $1,200.50 in all", "$1,200.50"),
        (r"$\frac{1}{3}$", r"\frac{1}{3}"),
        (r"$5 of it, so $\frac{1}{3}$.", r"\frac{1}{3}"),
        (r"$\frac{1}{3}$ of 6 is 2", "2"),
        ("$3 and $4", "$4"),
        ("1-2", "2"),
        ("no number", None),
        ("", None),
    ],
)
def test_result_of(text: str, result: str | None) -> None:
    assert result_of(text) == result


def test_judges_samples() -> None:
    verifier = MathEqual("answer")

    def score(answer: str, expected: object) -> float | None:
        (verdict,) = verifier.judge([Sample("What is 6 * 3?", answer, {"answer": expected})])
        return verdict.score

    assert score("6 times 3 is 18", "He has 6 * 3 = 18.\n#### 18") == 1
    assert score("The answer is 18.", 18) == 1
    assert score("The answer is 17.", 18.0) == 0
    assert score("<think>it is 18</think>\n\\boxed{17}", "18") == 0
    assert score("<think>it is 18", "18") == 0  # never answered
    assert score("<think>it is 17</think>18", "18") == 1
    assert score("18", None) is None
    assert score("18", ["18"]) is None
    assert score("18", "") is None
    assert MathEqual("target").judge([Sample("", "5", {"target": "5"})])[0].score == 1


@pytest.mark.parametrize(
    "attack",
    [
        *("9**9**9", "9^9^9", "(9^9)^9^9", "9^99999", "1e999999", "9" * 499, "2^4000*2^4000*2^4000"),
        *(
            "(" * 499,
            "$\\a" * 30_000,
            "$\\a " + "\\a" * 50_000,
            "-" * 499,
            "sqrt(" * 90,
            "sqrt(99999999)" * 30,
            r"\frac{" * 80,
            r"\boxed{" * 5000,
        ),
        *("(x+y+z)^30" * 40, "(x+y)^30*(x-y)^30" * 10, "(x/(x+1)+" * 30 + "x" + ")" * 30, "x^30^30^30"),
        *("answer" + " " * 90_000, "answer is " + "*" * 90_000, "1," * 50_000, "1" * 100_000, "$" * 100_000),
        *("#" * 100_000, "<think>" * 10_000, "{" * 100_000, "^{" * 200 + "}" * 200, "\\text{" * 10_000),
    ],
    ids=lambda attack: attack[:20],
)
def test_nothing_hangs(attack: str) -> None:
    start = time.process_time()
    for answer, expected in ((attack, "1"), ("1", attack), (rf"\boxed{{{attack}}}", attack[:400])):
        MathEqual("answer").judge([Sample("", answer, {"answer": expected})])
    assert time.process_time() - start < 2


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789xy+-*/^()., %{}$\\e=sqrtfac", max_size=60))
def test_any_text_gets_a_verdict(text: str) -> None:
    (verdict,) = MathEqual("answer").judge([Sample("", text, {"answer": text.strip() or "1"})])
    assert verdict.score in (0.0, 1.0)


NUMBERS = st.fractions(min_value=-1000, max_value=1000, max_denominator=100)
TREES = st.recursive(NUMBERS, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner), max_leaves=8)


@settings(max_examples=50, deadline=None)
@given(TREES)
def test_sums_are_exact(tree: object) -> None:
    """The oracle is Python's own arithmetic of fractions."""

    def value(node: object) -> Fraction:
        if isinstance(node, Fraction):
            return node
        assert isinstance(node, tuple)
        left, sign, right = node
        a, b = value(left), value(right)
        return a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b

    try:
        expected = value(tree)
    except ZeroDivisionError:
        with pytest.raises(UnreadableError):
            read_expression(_written(tree))
        return
    text = _written(tree)
    if len(text) < 400:
        assert read_expression(text).equals(read_expression(f"({expected})"))
        assert not read_expression(text).equals(read_expression(f"({expected + 1})"))


def _written(node: object) -> str:
    if isinstance(node, Fraction):
        return f"({node})"
    assert isinstance(node, tuple)
    return f"({_written(node[0])} {node[1]} {_written(node[2])})"
