"""System messages that bring a teacher to explain itself (Mukherjee et al. 2023, "Orca"): the same question is answered
with steps, with reasons, or for a child, and the student learns from how as much as from what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from danlu.data.corpus import ErrorPolicy, find_sources, split_weight
from danlu.data.labelled import objects
from danlu.data.split import unit_hash
from danlu.errors import DanluError


@dataclass(frozen=True)
class System:
    """A system message, and how often it is drawn beside others; an empty one stands for none."""

    id: str
    content: str
    weight: float = 1.0


NONE = System("none", "")
OWN = "own"
"""The id of a system message that a prompt brings itself."""

BUILT_IN = (
    NONE,
    System("helpful", "You are a helpful assistant. Answer the question fully, so that nothing has to be looked up."),
    System(
        "step-by-step",
        "You are a careful assistant. Work through the task one step at a time, say what each step does and why, and "
        "finish with the answer.",
    ),
    System(
        "think-then-answer",
        "First think about the question: what is given, what is asked, and which ways lead there. Write these thoughts "
        "down, check them, and only then give your answer.",
    ),
    System(
        "justify",
        "Give your answer, then justify it: name the facts and rules that it rests on, and show that they lead to it.",
    ),
    System(
        "like-to-a-child",
        "Explain as you would to a curious ten-year-old: short sentences, everyday words, and an example from daily "
        "life where one helps.",
    ),
    System(
        "teacher",
        "You are a patient teacher. Your student should be able to solve the next such task alone, so explain the idea "
        "behind the solution along with the solution.",
    ),
    System(
        "plan",
        "Begin with a short plan in numbered points. Then carry the plan out point by point, and end with the result.",
    ),
    System(
        "check",
        "Solve the task, then check your solution in a second way, correct what the check finds, and state the final "
        "answer.",
    ),
    System(
        "expert",
        "You are an expert in the field of the question. Answer precisely, define the terms that you use, and mention "
        "where people usually go wrong.",
    ),
    System("brief", "Answer in as few words as are needed, with one sentence that says why."),
)  # fmt: skip


class Systems:
    """System messages to draw from.

    Args:
        seed: the one that a prompt gets depends on it and on the prompt alone.
    """

    def __init__(self, systems: Sequence[System], seed: int) -> None:
        self.systems, self._seed = list(systems), seed
        self._bounds = list(itertools.accumulate(system.weight for system in systems))

    @classmethod
    def read(cls, entries: Sequence[str], seed: int) -> Systems:
        """Those that a config names: `built-in`, `none`, ids, files, each with `::WEIGHT` where it is not 1.

        Raises:
            DanluError: an entry that is none of these, a broken row, an id that comes twice.
        """
        found: list[System] = []
        for entry in entries:
            try:
                name, weight = split_weight(entry)
            except ValueError as error:
                raise DanluError(f"systems: {error}") from None
            found += [replace(system, weight=system.weight * weight) for system in _named(name)]
        if not found:
            raise DanluError("systems: none is named; write none to ask without")
        by_id: dict[str, System] = {}
        for system in found:
            if by_id.setdefault(system.id, system) is not system:
                raise DanluError(f"systems: {system.id!r} comes twice; name it once, or give the rows other ids")
        return cls(found, seed)

    def draw(self, key: str) -> System:
        """The system message of a prompt."""
        point = unit_hash(self._seed, "system", key) * self._bounds[-1]
        return next(s for s, bound in zip(self.systems, self._bounds, strict=True) if point < bound)


def _named(name: str) -> list[System]:
    known = {"built-in": list(BUILT_IN), **{system.id: [system] for system in BUILT_IN}}
    if name in known:
        return known[name]
    if not Path(name).expanduser().is_file():
        raise DanluError(f"systems: {name!r} is no file and none of {', '.join(known)}")
    return _of_file(Path(name).expanduser())


def _of_file(path: Path) -> list[System]:
    policy = ErrorPolicy("stop")
    found: list[System] = []
    for source in find_sources([str(path)], (), (), policy):
        for file in source.files:
            for row, where in objects(file, policy):
                content, weight = row.get("system"), row.get("weight")
                if not isinstance(content, str):
                    raise DanluError(f"{where}: field 'system' is missing or no text; expected a system message")
                weight = 1.0 if weight is None else weight
                if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                    raise DanluError(f"{where}: the weight {weight!r} is no number above 0")
                found.append(System(str(row.get("id") or f"{path.name}:{len(found) + 1}"), content.strip(), weight))
    if not found:
        raise DanluError(f"{path}: holds no system message; expected rows with the field 'system'")
    return found
