"""Answers to the same held-out prompts before, while and after a policy was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from danlu.formats.card import Card
from danlu.report import numbers
from danlu.training.metrics import read_metrics

SHOWN = 3
"""Answers to a prompt that stand side by side."""


@dataclass
class Answer:
    """What was answered from one measurement to another, without change."""

    when: str
    text: str
    verdict: str
    """The reward and its parts, or why there is none."""
    better: bool
    """Its reward is higher than that of the first answer."""


@dataclass
class AskedPrompt:
    """A held-out prompt with its answers, in the order of time.

    Attributes:
        shown: the first, one halfway, and the last.
        others: those between, if there are any.
    """

    prompt: str
    shown: list[Answer]
    others: list[Answer]


def read_answers(folder: Path | None, card: Card, most: int) -> list[AskedPrompt]:
    """The answers that a run has written down; if its folder is gone, the last ones, which its card has."""
    lines = read_metrics(folder / "samples.jsonl") if folder is not None else []
    if not lines:
        lines = [{"step": card.metrics.get("steps"), **s} for s in _dicts(card.details.get("samples"))]
    lines = [line for line in _dicts(lines) if isinstance(line.get("step"), int)]
    by_prompt: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _, measured in groupby(lines, key=lambda line: line["step"]):
        for place, line in enumerate(measured):
            by_prompt.setdefault((place, str(line.get("prompt", ""))), []).append(line)
    return [_asked(prompt, found) for (_, prompt), found in list(by_prompt.items())[:most]]


def _dicts(values: object) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _asked(prompt: str, lines: Sequence[Mapping[str, Any]]) -> AskedPrompt:
    first = lines[0].get("reward")
    answers = [
        _answer(same, first)
        for _, group in groupby(lines, key=lambda line: (line.get("answer"), line.get("reward")))
        if (same := list(group))
    ]
    if len(answers) <= SHOWN:
        return AskedPrompt(prompt, answers, [])
    halfway = len(answers) // 2
    others = [answer for number, answer in enumerate(answers[:-1]) if number not in (0, halfway)]
    return AskedPrompt(prompt, [answers[0], answers[halfway], answers[-1]], others)


def _answer(same: Sequence[Mapping[str, Any]], first: object) -> Answer:
    line, begin, end = same[0], same[0]["step"], same[-1]["step"]
    when = f"step {begin}" if begin == end else f"steps {begin} to {end}"
    when = {0: "before"}.get(begin, when) if begin == end else when.replace("steps 0 to", "before, and to step")
    reward, parts = line.get("reward"), line.get("parts")
    verdict = f"reward {numbers.decimal(reward)}"
    if reward is None:
        verdict = f"not judged: {line.get('problem') or ''}"
    elif isinstance(parts, dict) and len(parts) > 1:
        each = (f"{numbers.verifier(name)} {numbers.decimal(score, 2)}" for name, score in parts.items())
        verdict += " · " + ", ".join(each)
    better = isinstance(reward, (int, float)) and isinstance(first, (int, float)) and reward > first
    return Answer(when, str(line.get("answer", "")), verdict, better)
