"""The text of an answer: thoughts and answer apart, likeness to another text, or what a regular expression says.

An expression can take for ever on an answer that is made for it, so that it is tried in a worker (``entry_point.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from danlu.evaluation.rouge import rouge_l, tokens
from danlu.posttraining.verifiers.base import OneByOne, Sample, Verdict, text_field, without_thoughts

MAX_ANSWER = 200_000
"""Characters."""

Scored = tuple[float | None, str]
"""A score, or None where there can be none, and the reason."""


class ThinkFormat(OneByOne):
    """``<think>thoughts</think>answer``. A quarter of the point for each: it begins with the only ``<think>``; there is
    one ``</think>``; thoughts stand between them; an answer follows.

    Args:
        opened: the prompt ends in ``<think>`` already, and the answer has none.
    """

    def __init__(self, opened: bool) -> None:
        self._opened = opened

    def one(self, sample: Sample) -> Verdict:
        text = sample.answer
        if self._opened:
            begins = "<think>" not in text
        else:
            begins = text.lstrip().startswith("<think>") and text.count("<think>") == 1
        before, _, answer = text.partition("</think>")
        once = text.count("</think>") == 1
        checks = {
            "has a <think> of its own" if self._opened else "does not begin with the only <think>": begins,
            "has not one </think>": once,
            "thinks nothing": once and bool(before.replace("<think>", "").strip()),
            "has no answer behind </think>": once and bool(answer.strip()),
        }
        missed = [reason for reason, good in checks.items() if not good]
        return Verdict(1 - len(missed) / len(checks), "; ".join(missed))


class RougeL(OneByOne):
    """How much the answer has in common with the expected one: ROUGE-L, F1 over words and signs.

    Args:
        field: of the row that holds the expected answer.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    def one(self, sample: Sample) -> Verdict:
        wanted = text_field(sample.row, self._field)
        answer = without_thoughts(sample.answer)
        if max(len(answer), len(wanted)) > MAX_ANSWER:
            return Verdict(0.0 if len(answer) > MAX_ANSWER else None, f"has more than {MAX_ANSWER} characters")
        return Verdict(rouge_l(tokens(answer), tokens(wanted)))


def regex(prompt: object, answer: str, row: Mapping[str, Any], *, pattern: str) -> Scored:
    """1 where the expression is found somewhere in the answer (with ``^`` and ``$``: in all of it), else 0."""
    if len(answer) > MAX_ANSWER:
        return 0.0, f"has more than {MAX_ANSWER} characters"
    found = re.search(pattern, answer) is not None
    return float(found), "" if found else "does not match"
