"""The card: `danlu.json`, which every folder danlu makes carries.

It says what the folder is, which verb made it with which config out of which inputs (with their fingerprints and,
nested, their own cards: the lineage), with which metrics and versions. A stage is open from :meth:`Stage.open` to
:meth:`Stage.finish`; in between the folder holds `danlu.run.json`, by which an interrupted run is recognised and
resumed. A folder whose card has the same fingerprint (same verb, same config, same inputs) need not be made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from danlu import config as configs
from danlu import files
from danlu.errors import DanluError

CARD = "danlu.json"
RUN = "danlu.run.json"

Kind = Literal["data", "tokenizer", "model", "adapter", "evaluation"]

_SHAPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "verb", "fingerprint", "created"), str),
    **dict.fromkeys(("config", "metrics", "details", "versions", "files"), dict),
    "seconds": (int, float),
}
"""What a card from elsewhere must hold, so that readers may rely on it."""


@dataclass
class Input:
    """One thing an artifact was made from."""

    role: str
    path: str
    fingerprint: str
    card: dict[str, Any] | None = None
    """The input's own card, so that a folder tells its whole lineage when the others are gone."""


@dataclass
class Card:
    """Where an artifact comes from and what is known about it. ``seconds`` is wall time of the verb."""

    kind: Kind
    verb: str
    fingerprint: str
    config: dict[str, Any]
    inputs: list[Input] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0

    def save(self, folder: str | Path) -> None:
        """Write the card into its folder."""
        files.write_json(Path(folder) / CARD, dataclasses.asdict(self))

    def changed_file(self, folder: str | Path) -> str | None:
        """The first file of the card that is missing or has another size; None when the folder is whole."""
        for name, recorded in self.files.items():
            path = Path(folder) / name
            if not path.is_file() or path.stat().st_size != recorded["bytes"]:
                return name
        return None

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Read the card of a folder.

        Raises:
            DanluError: there is none, or it is not a card.
        """
        path = Path(folder) / CARD
        if not path.exists():
            raise DanluError(f"{folder}: has no {CARD}; it was not made by danlu or is not finished")
        return cls.from_dict(files.read_json(path), path)

    @classmethod
    def from_dict(cls, content: Any, where: object = CARD) -> Card:
        """A card from its JSON form."""
        try:
            known = {f.name for f in dataclasses.fields(cls)}
            values = {key: value for key, value in content.items() if key in known}
            values["inputs"] = [Input(**item) for item in values.get("inputs", [])]
            card = cls(**values)
            for name, shape in _SHAPES.items():
                if not isinstance(getattr(card, name), shape):
                    raise TypeError(f"{name} is {getattr(card, name)!r}")
            return card
        except (TypeError, AttributeError) as error:
            raise DanluError(f"{where}: is not a danlu card ({error})") from error


def card_if_any(folder: str | Path) -> Card | None:
    """The card of a folder, or None for folders from elsewhere."""
    return Card.load(folder) if (Path(folder) / CARD).exists() else None


def fingerprint_of(path: str | Path) -> str:
    """Fingerprint of an input: its card's, or a hash of names and contents for what comes from elsewhere."""
    target = Path(path)
    if not target.exists():
        raise DanluError(f"{path}: does not exist")
    if target.is_dir() and (card := card_if_any(target)) is not None:
        return card.fingerprint
    members = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for member in members:
        digest.update(f"{member.relative_to(target)}\0{files.sha256_file(member)}\n".encode())
    return digest.hexdigest()


def input_of(role: str, path: str | Path) -> Input:
    """Describe an input for a card."""
    card = card_if_any(path) if Path(path).is_dir() else None
    content = dataclasses.asdict(card) if card else None
    if content is not None:
        content.pop("files")
    return Input(role, str(path), fingerprint_of(path), content)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("danlu", "torch", "numpy", "tokenizers", "safetensors", "pyarrow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass
class Stage:
    """An output folder while a verb fills it."""

    out: Path
    card: Card
    finished: bool
    """The folder already holds this very result: return it, do nothing."""
    resumed: bool
    """The folder holds an interrupted run of this very stage."""
    created: bool = False
    """The folder did not exist before."""
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls,
        out: str | Path,
        *,
        kind: Kind,
        verb: str,
        config: object,
        inputs: Mapping[str, str | Path | Input] | None = None,
        overwrite: bool = False,
    ) -> Stage:
        """Claim an output folder for a verb.

        Args:
            out: the folder to fill; made if it is missing.
            config: the verb's config dataclass; fields declared with ``affects_result=False`` do not count in the
                fingerprint.
            inputs: role -> path of the folders and files the result depends on, or an Input whose fingerprint is known.
            overwrite: empty a folder that holds another danlu result first. Folders danlu did not make are never
                emptied.

        Raises:
            DanluError: the folder cannot be written, or holds something else.
        """
        folder = Path(out)
        found_inputs = [i if isinstance(i, Input) else input_of(role, i) for role, i in (inputs or {}).items()]
        fingerprint = configs.fingerprint(config, verb, *(f"{i.role}={i.fingerprint}" for i in found_inputs))
        card = Card(kind, verb, fingerprint, configs.to_dict(config), found_inputs)
        created = not folder.exists()
        files.require_writable(folder)
        finished = resumed = False
        if (folder / CARD).exists():
            made = Card.load(folder)
            same, changed = made.fingerprint == fingerprint, made.changed_file(folder)
            if same and changed is not None and not overwrite:
                raise DanluError(
                    f"{folder / changed}: is missing or was changed since it was made; make it again with --overwrite"
                )
            finished = same and changed is None
        elif (folder / RUN).exists():
            marker = files.read_json(folder / RUN)
            resumed = isinstance(marker, dict) and marker.get("fingerprint") == fingerprint
        ours = any((folder / name).exists() for name in (CARD, RUN))
        strangers = [p for p in folder.iterdir() if not p.name.startswith(".")] if not ours else []
        if strangers:
            raise DanluError(
                f"{folder}: is not empty ({strangers[0].name}, ...) and was not made by danlu; choose another --out"
            )
        if ours and not finished and not resumed:
            if not overwrite:
                raise DanluError(
                    f"{folder}: holds another run (other config or inputs); choose another --out, or replace it "
                    "with --overwrite"
                )
            for member in folder.iterdir():
                shutil.rmtree(member) if member.is_dir() and not member.is_symlink() else member.unlink()
        stage = cls(folder, card, finished, resumed, created)
        if finished:
            stage.card = Card.load(folder)
        elif not resumed:
            files.write_json(folder / RUN, {"verb": verb, "fingerprint": fingerprint, "config": card.config})
        return stage

    def finish(self, metrics: Mapping[str, Any] | None = None, details: Mapping[str, Any] | None = None) -> Card:
        """Write the card; from here on the folder counts as made."""
        self.card.metrics = dict(metrics or {})
        self.card.details = dict(details or {})
        self.card.versions = versions()
        self.card.created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.card.seconds = round(time.monotonic() - self._started, 3)
        self.card.files = {
            str(p.relative_to(self.out)): {"bytes": p.stat().st_size, "sha256": files.sha256_file(p)}
            for p in sorted(self.out.iterdir())
            if p.is_file() and p.name not in (CARD, RUN) and not p.name.startswith(".")
        }
        self.card.save(self.out)
        (self.out / RUN).unlink(missing_ok=True)
        return self.card

    def abandon(self) -> None:
        """Let go of the folder after a mistake found before anything was written; the mended command can have it."""
        (self.out / RUN).unlink(missing_ok=True)
        if self.created:
            with contextlib.suppress(OSError):  # it holds something after all
                self.out.rmdir()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Around what comes before the first output: a mistake found there lets go of the folder, unless an interrupted
        run has left something in it."""
        try:
            yield
        except DanluError:
            if all(path.name == RUN for path in self.out.iterdir()):
                self.abandon()
            raise
