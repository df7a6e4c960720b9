"""What both sides of `posttraining.py` reward, in the form that each calls it: a number that tells answers apart and
costs nothing."""

from __future__ import annotations

from typing import Any


def letters(answer: str) -> float:
    """Share of an answer that is letters."""
    return sum(character.isalpha() for character in answer) / max(1, len(answer))


def for_danlu(prompt: object, answer: str, row: object) -> float:
    """As ``danlu align --reward posttraining_reward:for_danlu`` calls it."""
    return letters(answer)


def for_trl(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """As TRL's trainer calls it."""
    return [letters(completion[0]["content"]) for completion in completions]
