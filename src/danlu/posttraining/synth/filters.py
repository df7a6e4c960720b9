"""Which answers are not worth learning from, and how many each filter took."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.data.dedup import Deduplicator, Duplicates
from danlu.data.repetition import WORDS, too_repetitive
from danlu.posttraining.synth.candidates import Candidate
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.jobs import Answer
from danlu.posttraining.synth.refusals import is_refusal
from danlu.posttraining.verifiers import Sample, Verifiers

SAMPLES = 5
"""Examples of what a filter took that the card keeps."""

CODE = re.compile(r"^[ \t]*```.*?(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Filter:
    """A name, one sentence, and the reason to take an answer (None: it may stay)."""

    name: str
    help: str
    why: Callable[[Answer], str | None]


def n_words(text: str) -> int:
    """Words: runs of letters and digits, and single characters of scripts without spaces."""
    return len(WORDS.findall(text))


def filters_of(config: SynthConfig) -> list[Filter]:
    """Those that look at one answer alone, in the order they are applied."""

    def too_short(answer: Answer) -> str | None:
        n = n_words(answer.text)
        return f"has {n} words, fewer than {config.min_words}" if n < config.min_words else None

    def too_long(answer: Answer) -> str | None:
        n = n_words(answer.text)
        most = config.max_words
        return f"has {n} words, more than {most}" if most is not None and n > most else None

    def refused(answer: Answer) -> str | None:
        if answer.finish_reason == "content_filter":
            return "the endpoint's content filter ended it"
        return is_refusal(answer.text)

    found = [
        Filter(
            "cut_off",
            "Answers that end where the longest answer does: their end would never be learned.",
            lambda answer: (
                "reached max_new_tokens, or the end of the context" if answer.finish_reason == "length" else None
            ),
        ),
        Filter("empty", "Answers without text.", lambda answer: None if answer.text.strip() else "has no text"),
        Filter("short", "Answers with fewer than min_words.", too_short),
        Filter("long", "Answers with more than max_words.", too_long),
        Filter("refusal", "Answers that refuse, in English or Chinese.", refused),
        Filter(
            "repetition",
            "Prose that repeats itself beyond the limits of Gopher; blocks of code may.",
            lambda answer: too_repetitive(CODE.sub("", answer.text)),
        ),
    ]
    return [one for one in found if one.name not in config.without]


OF_ALL = {
    "unjudged": "Answers that a verifier could not judge.",
    "wrong": "Answers that did not pass the check.",
    "spare": "Answers that passed; another to the same prompt was kept.",
    "duplicate": "Rows with the same prompt and answer as an earlier one, but for white space.",
    "near_duplicate": "Rows nearly the same as an earlier one (MinHash over word 3-grams, then compared exactly).",
}
"""What is found by comparing, or by verifiers."""


def apply_filters(candidates: Sequence[Candidate], filters: Sequence[Filter]) -> None:
    """Mark those that a filter takes."""
    for candidate in candidates:
        for one in filters:
            if (why := one.why(candidate.answer)) is not None:
                candidate.dropped = one.name, why
                break


def check_answers(candidates: Sequence[Candidate], verifiers: Verifiers, least: float | None) -> None:
    """Judge those that are left, and mark those that do not pass, or cannot be judged.

    Args:
        least: weighted sum of the scores that passes; None: a whole point of each verifier.
    """
    left = [candidate for candidate in candidates if candidate.dropped is None]
    samples = [Sample(c.question.prompt.messages, c.answer.text, c.question.prompt.row) for c in left]
    for candidate, judgement in zip(left, verifiers.judge(samples), strict=True):
        candidate.score = judgement.score
        if judgement.score is None:
            candidate.dropped = "unjudged", judgement.problem or "was not judged"
            continue
        whole = all(part is not None and part >= 1 for part in judgement.parts.values())
        if not (whole if least is None else judgement.score >= least):
            reasons = "; ".join(f"{spec}: {why}" for spec, why in judgement.reasons.items())
            candidate.dropped = "wrong", reasons or f"scores {judgement.score:g}"


def choose(candidates: Sequence[Candidate], keep: str) -> None:
    """Of each question's answers that passed, mark those beside the first, or beside the best."""
    by_question: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.dropped is None:
            by_question.setdefault(candidate.question.number, []).append(candidate)
    for passed in by_question.values() if keep != "all" else ():
        chosen = max(passed, key=lambda c: c.score or 0.0) if keep == "best" else passed[0]  # max takes the first
        for candidate in passed:
            if candidate is not chosen:
                candidate.dropped = "spare", f"answer {chosen.sample + 1} was kept"


def drop_duplicates(candidates: Sequence[Candidate], config: SynthConfig) -> Duplicates:
    """Mark copies and near-copies of earlier rows; returns what was found about those that were left before."""
    left = [candidate for candidate in candidates if candidate.dropped is None]
    known = Deduplicator(near=True, threshold=config.near_duplicates)
    exact = [known.add(candidate.text) for candidate in left]
    found = known.find(lambda i: left[i].text)
    for i, candidate in enumerate(left):
        name = "duplicate" if exact[i] else "near_duplicate"
        if int(found.copy_of[i]) != i and name not in config.without:
            candidate.dropped = name, f"is like {left[int(found.copy_of[i])].question.prompt.where}"
    return found


def report(candidates: Sequence[Candidate], config: SynthConfig) -> list[dict[str, Any]]:
    """What the card holds of the filters."""
    names = {one.name: one.help for one in filters_of(config)} | OF_ALL
    return [_report(name, help, candidates) for name, help in names.items() if _is_on(name, config)]


def _is_on(name: str, config: SynthConfig) -> bool:
    if name in ("unjudged", "wrong"):
        return bool(config.check)
    return name not in config.without and (name != "spare" or config.n > 1)


def _report(name: str, help: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
    taken = [c for c in candidates if c.dropped is not None and c.dropped[0] == name]
    return {
        "name": name,
        "help": help,
        "documents_removed": len(taken),
        "documents_changed": 0,
        "bytes_removed": sum(len(c.answer.text.encode()) for c in taken),
        "samples": list(_samples(taken[:SAMPLES])),
    }


def _samples(taken: Sequence[Candidate]) -> Iterator[dict[str, str]]:
    for candidate in taken:
        assert candidate.dropped is not None
        yield {
            "path": candidate.question.prompt.where, "before": candidate.answer.text[:400], "after": "",
            "why": candidate.dropped[1],
        }  # fmt: skip
