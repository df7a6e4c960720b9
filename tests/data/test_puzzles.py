"""Puzzles have one right answer, the thoughts lead there, and no held-out one is learned from."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from danlu.data.folder import DataFolder
from danlu.data.puzzles import PuzzlesConfig, addition, countdown, countdown_solved, make_puzzles
from danlu.errors import DanluError


def test_additions_are_right() -> None:
    rng = random.Random(0)
    for _ in range(500):
        puzzle = addition(rng, 4)
        a, b = map(int, puzzle.question.split("+"))
        assert int(puzzle.answer) == a + b
        sums = [int(step.split("=")[1]) for step in puzzle.thoughts.split()]
        assert len(sums) == puzzle.difficulty == len(str(a))
        digits = "".join(str(total % 10) for total in reversed(sums))
        assert int(("1" if sums[-1] > 9 else "") + digits) == a + b


def test_countdowns_are_right() -> None:
    rng = random.Random(0)
    for _ in range(500):
        puzzle = countdown(rng, 2)
        found = re.fullmatch(r"(\d+) (\d+) to (\d+)", puzzle.question)
        assert found is not None
        row = {"answer": puzzle.answer}
        assert countdown_solved("", f"<think>{puzzle.thoughts}</think>{puzzle.answer}", row)[0] == 1
        assert puzzle.thoughts.endswith(f"{puzzle.answer}={found[3]}")


@pytest.mark.parametrize(
    ("answer", "score"),
    [("8*3", 1), ("3 * 8", 1), ("4*6", 0), ("24", 0), ("3*8=24", 0), ("", 0), ("9" * 5000 + "*1", 0)],
)
def test_the_verifier(answer: str, score: float) -> None:
    assert countdown_solved("3 8 to 24", f"<think>3*8=24</think>{answer}", {"answer": "3*8"})[0] == score


def test_a_folder_of_them(tmp_path: Path) -> None:
    folder = make_puzzles(PuzzlesConfig(out=tmp_path / "puzzles", n=200, heldout=50))
    train, held_out = (list(DataFolder(folder).documents(split)) for split in ("train", "heldout"))
    assert (len(train), len(held_out)) == (200, 50)
    assert len({document.id for document in (*train, *held_out)}) == 250
    answer = train[0].messages()[1]["content"]
    assert answer.startswith("<think>")
    assert answer.endswith(f"</think>{train[0].meta['answer']}")
    with pytest.raises(DanluError, match="hardly more than"):
        make_puzzles(PuzzlesConfig(out=tmp_path / "few", n=200, digits=1))
    assert not (tmp_path / "few").exists()
