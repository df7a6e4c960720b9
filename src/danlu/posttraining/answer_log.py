"""`samples.jsonl`: how the same held-out prompts are answered before, while and after a policy is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from danlu.posttraining.experience import Judged
from danlu.training.metrics import drop_lines_after

SAMPLES = "samples.jsonl"

PROMPTS = 8
"""Prompts whose answers are kept; the first of those that are held out."""


class AnswerLog:
    """Appends the answers of each measurement, one a line: ``step`` (0: before training), ``prompt``, ``answer``,
    ``reward``, ``parts`` (the score of each verifier), ``problem`` (why it could not be judged).

    Lines of the measured step and of later ones are dropped first: a run that was killed and goes on, or that measures
    a step twice, leaves the file of one that did neither.

    Args:
        step: tells which step was the last.
    """

    def __init__(self, out: Path, step: Callable[[], int]) -> None:
        self.path, self.step = out / SAMPLES, step
        self._written: int | None = None

    def write(self, groups: Sequence[Sequence[Judged]]) -> None:
        """The answers of one measurement, a group for each prompt."""
        step = self.step()
        if self._written is None or step <= self._written:
            drop_lines_after(self.path, step - 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples_of(groups))
        self._written = step


def samples_of(groups: Sequence[Sequence[Judged]]) -> list[dict[str, Any]]:
    """The first answer to each of the first prompts, as the log and the card have it."""
    return [_sample(group[0]) for group in groups[:PROMPTS]]


def _sample(one: Judged) -> dict[str, Any]:
    prompt = one.rollout.prompt
    return {
        "prompt": prompt.text or prompt.messages[-1]["content"],
        "answer": one.rollout.text,
        "reward": one.reward,
        "parts": one.judgement.parts,
        "problem": one.judgement.problem,
    }
