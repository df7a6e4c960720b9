"""Prompts, and the answers that may become rows."""

from __future__ import annotations

from dataclasses import dataclass

from danlu.data.folder import Split
from danlu.data.prompts import Prompt
from danlu.posttraining.synth.jobs import Answer, Job, Messages


@dataclass(frozen=True)
class Question:
    """A prompt as the teacher is asked it.

    Attributes:
        number: counted from 0, in the order of the data.
        system_id: of the system message that ``messages`` begin with.
        split: the one that the data put it in; None: none yet.
    """

    number: int
    prompt: Prompt
    messages: Messages
    system_id: str
    split: Split | None


@dataclass
class Candidate:
    """An answer to a question.

    Attributes:
        sample: which of the question's answers, from 0.
        score: what the verifiers gave.
        dropped: the filter that took it, and why; None: it is kept.
        difficulty, stage: of the curriculum.
    """

    question: Question
    sample: int
    job: Job
    answer: Answer
    score: float | None = None
    dropped: tuple[str, str] | None = None
    difficulty: float | None = None
    stage: int | None = None

    @property
    def text(self) -> str:
        """What was asked, the system message left out, and what was answered: what duplicates are found by."""
        asked = [message["content"] for message in self.question.prompt.messages if message["role"] != "system"]
        return "\n\n".join([*asked, self.answer.text])
