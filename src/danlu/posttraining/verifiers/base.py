"""What verifiers are given and what they say."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from danlu.errors import DanluError


@dataclass(frozen=True)
class Sample:
    """An answer to judge.

    Attributes:
        prompt: messages ``{"role", "content"}``, or the text that the answer goes on with.
        answer: what the model wrote.
        row: all fields of the row that the prompt is from: the expected answer, tests, a schema.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict)


MOST = 1e6
"""No score is further from 0: beyond, 32-bit numbers cannot tell answers apart, nor sum their squares."""


@dataclass(frozen=True)
class Verdict:
    """What one verifier says.

    Attributes:
        score: 0 for a wrong answer, 1 for a right one, or anything finite; None: it could not be judged.
        reason: why it is no better, or why there is none.
    """

    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Judgement:
    """What all verifiers together say.

    Attributes:
        score: the weighted sum of the parts; None where one of them is missing.
        parts: spec of each verifier (without its weight) -> its own score, before the weight.
        problem: which parts are missing, and why; None where none is.
        reasons: spec -> why the answer did not get all points, where the verifier told.
    """

    score: float | None
    parts: dict[str, float | None]
    problem: str | None
    reasons: dict[str, str] = field(default_factory=dict)


class Verifier(Protocol):
    """Judges answers; whatever they hold, a verdict for each comes back, in a bounded time."""

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]: ...

    def close(self) -> None: ...


class OneByOne(ABC):
    """A verifier that looks at each answer by itself, and holds nothing open. A row that lacks what :meth:`one` asks
    for (:class:`FieldError`) cannot be judged."""

    @abstractmethod
    def one(self, sample: Sample) -> Verdict:
        """The verdict on an answer."""

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]:
        return [self._try(sample) for sample in samples]

    def _try(self, sample: Sample) -> Verdict:
        try:
            return self.one(sample)
        except FieldError as error:
            return Verdict(None, str(error))

    def close(self) -> None:
        """Nothing is open."""
        return


class FieldError(Exception):
    """A row has not what a verifier needs; the message says what."""


def text_field(row: Mapping[str, Any], name: str) -> str:
    """The text (or number) of a field.

    Raises:
        FieldError: it is missing, or something else.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise FieldError(f"the row's field {name!r} is {'missing' if value is None else 'no text'}")
    return str(value)


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """The same, None where the field is missing."""
    return None if row.get(name) is None else text_field(row, name)


def without_thoughts(answer: str) -> str:
    """What follows the last ``</think>``; nothing where a thought was begun and not ended."""
    _, ended, rest = answer.rpartition("</think>")
    return rest if ended else "" if "<think>" in answer else answer


def fenced_blocks(answer: str) -> list[str]:
    """What stands between ``` marks, the last of which may be missing."""
    return re.findall(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", answer, re.DOTALL | re.MULTILINE)


def no_argument(spec: str, argument: str | None) -> None:
    """Refuse ``name=something`` of a verifier that takes nothing."""
    if argument is not None:
        raise DanluError(f"verifier {spec!r}: takes no {'=' + argument!r}; write it without")
