"""`danlu data puzzles`: small problems with one right answer and the thoughts that lead to it.

They are what reasoning can be learned and measured on at any size: a few worked solutions to begin with, and a check
that cannot be argued with. Each is a chat; its ``meta`` has the ``answer`` and a ``difficulty`` (digits).

    addition     47+86        <think>7+6=13 4+8+1=13</think>133             from the last digit to the first
    countdown    3 8 to 24    <think>3+8=11 8-3=5 3*8=24</think>3*8         two numbers, one of + - *
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from danlu import config as configs
from danlu.config import REQUIRED, option
from danlu.errors import DanluError

if TYPE_CHECKING:
    from danlu.data.folder import DataFolder

Kind = Literal["addition", "countdown"]


@dataclass(frozen=True, kw_only=True)
class PuzzlesConfig:
    """Options of :func:`make_puzzles`."""

    out: Path = option(REQUIRED, "Data folder to make; its documents are chats.", affects_result=False)
    puzzle: Kind = option("addition", "addition: two numbers; countdown: which of + - * makes two numbers a third.")
    n: int = option(4000, "Puzzles to learn from.", ge=1, le=10_000_000)
    heldout: int = option(400, "Puzzles held out; none of them is among the others.", ge=1, le=1_000_000)
    digits: int = option(3, "Most digits of a number; each length comes as often as any other.", ge=1, le=12)
    seed: int = option(0, "Seed.", ge=0, lt=2**63)
    overwrite: bool = option(False, "Replace the folder when it holds another result.", affects_result=False)


@dataclass(frozen=True)
class Puzzle:
    """What is asked, what it takes to find out, and what is right."""

    question: str
    thoughts: str
    answer: str
    difficulty: int


def addition(rng: random.Random, digits: int) -> Puzzle:
    """Two numbers of the same length, added digit by digit."""
    n = rng.randint(1, digits)
    low = 10 ** (n - 1) if n > 1 else 0
    a, b = rng.randint(low, 10**n - 1), rng.randint(low, 10**n - 1)
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return Puzzle(f"{a}+{b}", " ".join(steps), str(a + b), n)


def countdown(rng: random.Random, digits: int) -> Puzzle:
    """Two numbers, and what one of three operators makes of them."""
    n = rng.randint(1, digits)
    a, b = (rng.randint(1, 10**n - 1) for _ in range(2))
    tried = {f"{a}+{b}": a + b, f"{max(a, b)}-{min(a, b)}": abs(a - b), f"{a}*{b}": a * b}
    wanted = rng.choice(list(tried))
    target, steps = tried[wanted], []
    for expression, value in tried.items():
        steps.append(f"{expression}={value}")
        if value == target:
            return Puzzle(f"{a} {b} to {target}", " ".join(steps), expression, n)
    raise AssertionError("one of them is the target")


MAKERS: dict[Kind, Callable[[random.Random, int], Puzzle]] = {"addition": addition, "countdown": countdown}


def countdown_solved(prompt: object, answer: str, row: Mapping[str, Any]) -> tuple[float, str]:
    """Verifier of countdown, as ``danlu.data.puzzles:countdown_solved``: 1 where what follows the thoughts makes the
    target of the two numbers, whichever way."""
    expected = _value(str(row["answer"]))
    found = _value(answer.rpartition("</think>")[2].strip())
    if found is None or expected is None:
        return 0.0, "is no expression of two numbers"
    good = found[0] == expected[0] and sorted(found[1]) == sorted(expected[1])
    return float(good), "" if good else f"makes {found[0]} of {found[1]}, not {expected[0]} of {expected[1]}"


def _value(text: str) -> tuple[int, tuple[int, int]] | None:
    """The value of ``a+b``, ``a-b`` or ``a*b``, and the two numbers."""
    parts = re.fullmatch(r"(\d{1,12})\s*([-+*])\s*(\d{1,12})", text)
    if parts is None:
        return None
    a, b = int(parts[1]), int(parts[3])
    return {"+": a + b, "-": a - b, "*": a * b}[parts[2]], (a, b)


def make_puzzles(config: PuzzlesConfig) -> DataFolder:
    """Make a data folder of puzzles with worked solutions.

    Raises:
        DanluError: there are not so many different ones, or ``out`` cannot be used.
    """
    from danlu.console import note
    from danlu.data.folder import DataFolder, Document, ShardWriter
    from danlu.formats.card import Stage

    config = configs.validate(config)
    stage = Stage.open(
        config.out, kind="data", verb="data puzzles", config=config, inputs={}, overwrite=config.overwrite
    )
    if stage.finished:
        note(f"{config.out}: already made, nothing to do")
        return DataFolder(config.out)
    with stage.preparing():
        puzzles = list(_different(config))
    metrics: dict[str, Any] = {"documents_read": len(puzzles), "documents_kept": len(puzzles)}
    for split, part in (("heldout", puzzles[: config.heldout]), ("train", puzzles[config.heldout :])):
        with ShardWriter(stage.out, "heldout" if split == "heldout" else "train") as writer:
            for puzzle in part:
                messages = [
                    {"role": "user", "content": puzzle.question},
                    {"role": "assistant", "content": f"<think>{puzzle.thoughts}</think>{puzzle.answer}"},
                ]
                meta = {"answer": puzzle.answer, "difficulty": str(puzzle.difficulty)}
                text = json.dumps({"messages": messages}, ensure_ascii=False)
                writer.write(Document(id=puzzle.question, text=text, source=config.puzzle, kind="chat", meta=meta))
        metrics |= {f"{split}_documents": writer.n_documents, f"{split}_bytes": writer.n_bytes}
    stage.finish(metrics, {"sample": f"{puzzles[0].question} -> {puzzles[0].thoughts} -> {puzzles[0].answer}"})
    return DataFolder(config.out)


def _different(config: PuzzlesConfig) -> Iterator[Puzzle]:
    """As many as are wanted, each question once."""
    rng, seen, misses = random.Random(config.seed), set[str](), 0
    while len(seen) < config.n + config.heldout:
        puzzle = MAKERS[config.puzzle](rng, config.digits)
        if puzzle.question in seen:
            misses += 1
            if misses > 1000 + 20 * (config.n + config.heldout):
                raise DanluError(
                    f"there are hardly more than {len(seen):,} different puzzles of up to {config.digits} digits; "
                    f"ask for fewer (n, heldout: now {config.n + config.heldout:,}) or for more digits"
                )
            continue
        seen.add(puzzle.question)
        yield puzzle
