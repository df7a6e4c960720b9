"""From one model folder to everything it was made from: the cards inside its card, and the evaluations beside it.

A card holds the cards of its inputs, so the lineage is told even when the other folders are gone. Folders that can
still be found are needed for one thing only: the step-by-step metrics that the curves are drawn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from danlu.errors import DanluError
from danlu.formats.card import Card, Input, card_if_any


@dataclass
class Artifact:
    """One thing in the lineage. ``card`` is None for what danlu did not make (a corpus, a model from a hub)."""

    fingerprint: str
    path: str
    """As the verb that used it wrote it down."""
    card: Card | None
    folder: Path | None
    """Where it is now; None when it is gone or its place holds something else."""
    inputs: list[tuple[str, str]]
    """(role, fingerprint) of what it was made from."""

    @property
    def name(self) -> str:
        """Last part of its path."""
        return Path(self.path).name or self.path

    def is_untrained(self) -> bool:
        """A randomly initialised model, made to have something to compare with."""
        return self.card is not None and self.card.verb == "pretrain" and self.card.metrics.get("steps") == 0


@dataclass
class Evaluation:
    """One evaluation folder's card, and the model it measured."""

    card: Card
    model: Artifact
    label: str = ""
    """What readers call the measured model: untrained, pre-trained, fine-tuned."""


def read_lineage(folder: str | Path, *beside: str | Path) -> list[Artifact]:
    """Everything that went into a folder, oldest first; the folder itself is the last.

    Args:
        beside: folders whose lineages are told with it, such as another model made from the same one.

    Raises:
        DanluError: a folder has no card.
    """
    found: dict[str, Artifact] = {}
    for root in map(Path, (*beside, folder)):
        last = _collect(Card.load(root), str(root), root, found)
    found[last.fingerprint] = found.pop(last.fingerprint)
    return list(found.values())


def _collect(card: Card, path: str, folder: Path | None, found: dict[str, Artifact]) -> Artifact:
    """Depth first, so that every input stands before what was made from it."""
    for item in card.inputs:
        if item.fingerprint in found:
            continue
        if item.card is not None:
            _collect(Card.from_dict(item.card), item.path, _locate(item, folder), found)
        else:
            found[item.fingerprint] = Artifact(item.fingerprint, item.path, None, None, [])
    artifact = Artifact(card.fingerprint, path, card, folder, [(i.role, i.fingerprint) for i in card.inputs])
    return found.setdefault(card.fingerprint, artifact)


def _locate(item: Input, user: Path | None) -> Path | None:
    """The folder of an input: at its noted path, or beside the folder that used it (when both were moved together)."""
    candidates = [Path(item.path)]
    if user is not None:
        candidates.append(user.absolute().parent / Path(item.path).name)
    for candidate in candidates:
        try:
            card = card_if_any(candidate)
        except DanluError:
            continue
        if card is not None and card.fingerprint == item.fingerprint:
            return candidate
    return None


def find_evaluations(
    folders: Sequence[str | Path], lineage: list[Artifact], given: Iterable[Path] = ()
) -> list[Evaluation]:
    """The evaluations of a model and its forebears, in the order the models came to be.

    Args:
        folders: model folders; without ``given``, their sub-folders and their neighbours are looked through.
        given: evaluation folders named by the user; only these are then used.

    Raises:
        DanluError: a given folder is not an evaluation.
    """
    named = list(given)
    places = {place for folder in folders for place in (Path(folder).absolute().parent, Path(folder).absolute())}
    evaluations: list[Evaluation] = []
    for candidate in named or sorted({path for place in places for path in place.iterdir() if path.is_dir()}):
        card = Card.load(candidate) if named else _card_or_none(candidate)
        if card is None or card.kind != "evaluation":
            if named:
                raise DanluError(f"{candidate}: is not an evaluation; give a folder made by danlu evaluate")
            continue
        model = _measured_model(card, candidate)
        if model is not None and (named or _belongs(model, lineage)):
            evaluations.append(Evaluation(card, model))
    order = {artifact.fingerprint: float(index) for index, artifact in enumerate(lineage)}

    def place(model: Artifact) -> float:
        """One that is no part of the lineage comes behind what it was made from."""
        return order.get(model.fingerprint, max((order.get(f, -1) for _, f in model.inputs), default=-1) + 0.5)

    evaluations.sort(key=lambda e: (not e.model.is_untrained(), place(e.model), e.card.created))
    latest = {e.model.fingerprint: e for e in evaluations}  # of several evaluations of one model the newest counts
    evaluations = [e for e in evaluations if latest[e.model.fingerprint] is e]
    names = [_stage_name(e.model) for e in evaluations]
    for evaluation, name in zip(evaluations, names, strict=True):
        evaluation.label = name if names.count(name) == 1 else f"{name} ({evaluation.model.name})"
    return evaluations


def _card_or_none(folder: Path) -> Card | None:
    try:
        return card_if_any(folder)
    except DanluError:
        return None  # a neighbour that danlu cannot read is none of this report's business


def _measured_model(card: Card, folder: Path) -> Artifact | None:
    for item in card.inputs:
        if item.role == "model":
            model = Card.from_dict(item.card) if item.card else None
            inputs = [(i.role, i.fingerprint) for i in model.inputs] if model else []
            return Artifact(item.fingerprint, item.path, model, _locate(item, folder), inputs)
    return None


def _belongs(model: Artifact, lineage: list[Artifact]) -> bool:
    """The model is part of the lineage, or the untrained beginning of one that is."""
    known = {artifact.fingerprint for artifact in lineage}
    if model.fingerprint in known:
        return True
    return model.is_untrained() and all(fingerprint in known for _, fingerprint in model.inputs)


def _stage_name(model: Artifact) -> str:
    if model.is_untrained():
        return "untrained"
    verb = model.card.verb if model.card else ""
    names = {"pretrain": "pre-trained", "finetune": "fine-tuned", "distil": "distilled", "merge": "merged"}
    if verb == "align" and model.card is not None:
        return str(model.card.config.get("method", verb)).upper()
    return names.get(verb, model.name)
