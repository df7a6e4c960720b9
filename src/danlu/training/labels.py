"""Which labels a model has, and in which order a fine-tuned one gets them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danlu import files
from danlu.models.family import Task, family_for
from danlu.models.heads import read_labels


def known_labels(folder: Path, task: Task) -> tuple[str, ...]:
    """The labels that a model folder names for this task; none where it has another head, or none."""
    path = folder / "config.json"
    if not path.is_file():
        return ()
    content = files.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("id2label"), dict):
        return ()
    family = family_for(content, str(path))
    names = [name for name in content.get("architectures") or () if isinstance(name, str)]
    return read_labels(content) if any(family.architectures.get(name) == task for name in names) else ()


def order_of(found: Sequence[str], given: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The labels of a head: as the user numbered them; else as the model already has them, if it knows all that were
    found; else as they were found."""
    if given:
        return tuple(given)
    return tuple(known) if set(found) <= set(known) else tuple(found)
