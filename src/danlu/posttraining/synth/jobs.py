"""What a teacher is asked, and what comes back."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[dict[str, Any]]

SEEDS = 2**31
"""Seeds are below this, which every endpoint takes."""


@dataclass(frozen=True)
class Job:
    """One answer that is wanted.

    Attributes:
        messages: up to the answer; the last is the user's, or a tool's.
        where: what it is about, for errors.
    """

    messages: Messages
    seed: int
    where: str

    @functools.cached_property
    def key(self) -> str:
        """Names the job by what is asked, so that its answer is known again."""
        return digest(json.dumps([list(self.messages), self.seed], sort_keys=True))


@dataclass(frozen=True)
class Answer:
    """What the teacher wrote.

    Attributes:
        finish_reason: "stop", "length" (cut off), or what else an endpoint says.
        reasoning: thoughts that an endpoint tells apart from the answer.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    reasoning: str = ""

    @property
    def message(self) -> dict[str, str]:
        """It as the message of a chat."""
        told = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": "assistant", "content": self.text, **told}


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    Attributes:
        unreachable: nobody was there to be asked.
    """

    reason: str
    unreachable: bool = False


def seed_of(seed: int, purpose: str, key: str, number: int) -> int:
    """A seed for each of the answers to a prompt, which depends on nothing else."""
    return int(digest(f"{seed}\0{purpose}\0{key}\0{number}"), 16) % SEEDS


def digest(text: str) -> str:
    """128 bits that stand for a text, in hex."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
