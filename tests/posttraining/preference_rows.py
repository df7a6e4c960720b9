"""Preferences that a tiny model can learn: the better answer says add."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["def", "return", "text", "refines", "lambda", "while", "for", "in", "not", "and", "or", "is", "if", "else"]


def pairs(n: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and answers of all lengths."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [{"prompt": f"{i} {words(5)}", "chosen": f"add {words(6)}", "rejected": f"sub {words(6)}"} for i in range(n)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
