"""From the answers that were kept to a data folder: what is held out, in which order, and where each row comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu import console, files
from danlu.data.dedup import Duplicates, UnionFind
from danlu.data.folder import Document, ShardWriter, Split
from danlu.data.prompts import QUESTIONS
from danlu.data.split import choose_heldout
from danlu.errors import DanluError
from danlu.posttraining.synth.candidates import Candidate
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.filters import n_words

SAID = {*QUESTIONS, "input", "system", "text", "messages", "conversations", "instances"}
"""Fields of a row that are in the messages already."""
REJECTED = "rejected.jsonl"


def order_by_difficulty(kept: list[Candidate], asked: Sequence[Candidate], config: SynthConfig) -> None:
    """Sort rows from easy to hard and give each its difficulty and its stage, of stages of the same size (Bengio et al.
    2009, "Curriculum learning").

    Args:
        kept: the rows, sorted in place; equally hard ones stay in order.
        asked: all answers, for the pass rate.
    """
    if config.curriculum == "none":
        return
    answers: dict[int, list[bool]] = {}
    for candidate in asked:
        passed = candidate.dropped is None or candidate.dropped[0] in ("spare", "duplicate", "near_duplicate")
        answers.setdefault(candidate.question.number, []).append(passed)
    for candidate in kept:
        if config.curriculum == "length":
            candidate.difficulty = float(n_words(candidate.text))
        else:
            passes = answers[candidate.question.number]
            candidate.difficulty = round(1 - sum(passes) / len(passes), 6)
    kept.sort(key=lambda candidate: candidate.difficulty or 0.0)
    for rank, candidate in enumerate(kept):
        candidate.stage = rank * config.stages // len(kept) + 1


def held_out(left: Sequence[Candidate], found: Duplicates, config: SynthConfig) -> set[int]:
    """Numbers of the questions whose rows are held out: those that the data had held out, else a share, none of which
    is related to a question that is trained on.

    Args:
        left: what ``found`` was found about.
    """
    given = {c.question.number: c.question.split for c in left}
    if any(given.values()):
        return {number for number, split in given.items() if split == "heldout"}
    related, first_of = UnionFind(len(left)), dict[int, int]()
    for i, candidate in enumerate(left):
        related.union(i, int(found.group[i]))
        related.union(i, first_of.setdefault(candidate.question.number, i))
    kept = [i for i, candidate in enumerate(left) if candidate.dropped is None]
    try:
        chosen = choose_heldout(
            kept, related.roots(), lambda i: left[i].question.prompt.key, config.heldout, config.seed
        )
    except DanluError:  # so few rows, or all alike; they were paid for
        console.warn(f"{len(kept)} rows are too few, or too much alike, to hold some out; all are for training")
        return set()
    return {left[i].question.number for i in chosen}


def write_rows(
    out: Path, kept: Sequence[Candidate], held: set[int], teacher: dict[str, str], config: SynthConfig
) -> dict[str, int]:
    """Write the shards, and the stages of a curriculum as JSON Lines; returns what the card counts.

    Args:
        kept: in the order they are written.
        held: numbers of the questions that are held out.
        teacher: its name, and its fingerprint where it has one.
    """
    parts: dict[Split, list[Candidate]] = {"train": [], "heldout": []}
    for candidate in kept:
        parts["heldout" if candidate.question.number in held else "train"].append(candidate)
    counts = {"documents_kept": len(kept), "bytes_kept": 0}
    for split, part in parts.items():
        with ShardWriter(out, split) as writer:
            for candidate in part:
                meta = provenance(candidate, teacher, config)
                row = {"messages": messages_of(candidate)}
                writer.write(
                    Document(
                        id=f"{candidate.job.key}:{candidate.sample}",
                        text=json.dumps(row, ensure_ascii=False),
                        source="synth",
                        path=candidate.question.prompt.where,
                        kind="chat",
                        meta=meta,
                    )
                )
        counts |= {f"{split}_documents": writer.n_documents, f"{split}_bytes": writer.n_bytes}
        counts["bytes_kept"] += writer.n_bytes
    for stage in range(1, config.stages + 1) if config.curriculum != "none" else ():
        lines = [
            {"messages": messages_of(c), **provenance(c, teacher, config)} for c in parts["train"] if c.stage == stage
        ]
        write_lines(out / f"stage-{stage}.jsonl", lines)
    return counts


def write_rejected(out: Path, candidates: Sequence[Candidate], teacher: dict[str, str], config: SynthConfig) -> None:
    """What the filters took, with the reason of each: to look at, or for pairs of good and bad answers."""
    lines = [
        {"filter": c.dropped[0], "why": c.dropped[1], "messages": messages_of(c), **provenance(c, teacher, config)}
        for c in candidates
        if c.dropped is not None
    ]
    if lines:
        write_lines(out / REJECTED, lines)


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A JSON Lines file, whole or not at all."""
    files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def messages_of(candidate: Candidate) -> list[dict[str, Any]]:
    """The chat with its answer."""
    return [*candidate.question.messages, candidate.answer.message]


def provenance(candidate: Candidate, teacher: dict[str, str], config: SynthConfig) -> dict[str, str]:
    """Where a row comes from, and the fields of its prompt that verifiers look at; no time, so that the same run gives
    the same bytes."""
    made = {
        "prompt_source": candidate.question.prompt.where,
        **teacher,
        "system_id": candidate.question.system_id,
        "temperature": f"{config.temperature:g}",
        "top_p": f"{config.top_p:g}",
        "max_new_tokens": str(config.max_new_tokens),
        "seed": str(candidate.job.seed),
        "sample": str(candidate.sample),
        "finish_reason": candidate.answer.finish_reason,
    }
    for name, value in (("score", candidate.score), ("difficulty", candidate.difficulty), ("stage", candidate.stage)):
        if value is not None:
            made[name] = f"{value:g}"
    row = {
        f"row_{name}" if name in made else name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in candidate.question.prompt.row.items()
        if name not in SAID and value is not None
    }
    return {**row, **made}
