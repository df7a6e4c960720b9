"""The cache: content by its SHA-256, so that a file is stored once, checked on use, and never half there.

$DANLU_HOME (or the user's cache folder)/
    blobs/SHA256               one file's bytes, read-only
    refs/SOURCE.json           what a source resolved to: revision and the hash of each file; written last
    snapshots/SOURCE/DIGEST/   the files of a source under their own names, as links to the blobs
    partial/SOURCE/            an unfinished download, taken up again by the next pull
    locks/SOURCE               held while a source is fetched; the system drops it if the process dies
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from danlu import files
from danlu.console import note, progress, warn
from danlu.errors import DanluError


@dataclass(frozen=True)
class Blob:
    """One file of a snapshot."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Snapshot:
    """What a source resolved to: ``files`` maps relative paths (with ``/``) to contents."""

    source: str
    revision: str
    files: dict[str, Blob]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(blob.bytes for blob in self.files.values())


def safe_relative(name: str) -> str:
    """``name`` if it is a plain relative path; names from outside must not point out of the folder they are put in.

    Raises:
        DanluError: it is absolute, holds ``..`` or a backslash, or is empty.
    """
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        raise DanluError(f"{name!r}: is not a safe file name; the source is broken or hostile, do not use it")
    return name


class Cache:
    """The content-addressed cache in one folder.

    Raises:
        DanluError: the folder cannot be written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or files.cache_home()).absolute()
        try:
            for name in ("blobs", "refs", "snapshots", "partial", "locks"):
                files.require_writable(self.root / name)
        except DanluError as error:
            raise DanluError(
                f"{self.root}: danlu's cache cannot be kept here; name another folder in DANLU_HOME ({error})"
            ) from error

    def key(self, source: str) -> str:
        """A file name for a source: readable, and unique by its hash."""
        readable = re.sub(r"[^\w.=-]+", "-", source)[-80:].strip("-.")
        return f"{readable}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"

    @contextlib.contextmanager
    def lock(self, source: str) -> Iterator[None]:
        """Keep other processes from fetching the same source at the same time."""
        with open(self.root / "locks" / self.key(source), "wb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"{source}: another process is fetching it; waiting")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def partial(self, source: str) -> Path:
        """Folder for an unfinished download; it outlives a crash."""
        return files.require_writable(self.root / "partial" / self.key(source))

    def drop_partial(self, source: str) -> None:
        """The download is finished or useless."""
        shutil.rmtree(self.root / "partial" / self.key(source), ignore_errors=True)

    def blob(self, sha256: str) -> Path:
        """Where content with this hash is kept, whether it is there or not."""
        return self.root / "blobs" / sha256

    def adopt(self, path: Path, expected_sha256: str | None = None) -> Blob:
        """Move a whole file into the cache.

        Raises:
            DanluError: the content is not the expected one; the file is removed.
        """
        sha256, size = files.sha256_file(path), path.stat().st_size
        if expected_sha256 is not None and sha256 != expected_sha256:
            path.unlink()
            raise DanluError(
                f"{path.name}: has SHA-256 {sha256[:12]}... where {expected_sha256[:12]}... was expected; "
                "it was damaged on the way or replaced at its source. Try again, and do not use it if this stays"
            )
        try:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            path.chmod(0o444)
            os.replace(path, self.blob(sha256))
            files.fsync_folder(self.root / "blobs")
        except OSError as error:
            raise files.as_user_error(error, self.root) from error
        return Blob(sha256, size)

    def load(self, source: str) -> Snapshot | None:
        """What the source resolved to when it was last fetched; None if it never was."""
        path = self.root / "refs" / f"{self.key(source)}.json"
        if not path.exists():
            return None
        content = files.read_json(path)
        try:
            blobs = {safe_relative(name): Blob(**blob) for name, blob in content["files"].items()}
            return Snapshot(content["source"], content["revision"], blobs)
        except (KeyError, TypeError, AttributeError) as error:
            raise DanluError(f"{path}: is damaged; remove it and pull again") from error

    def save(self, snapshot: Snapshot) -> None:
        """Remember what a source resolved to; from here on it counts as fetched."""
        files.write_json(self.root / "refs" / f"{self.key(snapshot.source)}.json", dataclasses.asdict(snapshot))

    def missing(self, snapshot: Snapshot) -> list[str]:
        """Names of the files whose content is not in the cache; damaged content is removed and counts as not there."""
        lost = []
        with progress(f"Checking {snapshot.source}", total=snapshot.bytes, unit="bytes") as advance:
            for name, blob in snapshot.files.items():
                path = self.blob(blob.sha256)
                if path.is_file() and files.sha256_file(path) != blob.sha256:
                    warn(f"{name}: the copy in the cache is damaged; fetching it again")
                    path.unlink()
                if not path.is_file():
                    lost.append(name)
                advance(blob.bytes)
        return lost

    def folder(self, snapshot: Snapshot) -> Path:
        """The files of a snapshot under their own names, as links into the cache: read them, do not edit them."""
        listing = json.dumps(sorted((name, blob.sha256) for name, blob in snapshot.files.items()))
        parent = files.require_writable(self.root / "snapshots" / self.key(snapshot.source))
        target = parent / hashlib.sha256(listing.encode()).hexdigest()[:16]
        if all((target / name).is_file() for name in snapshot.files):
            return target
        building = Path(tempfile.mkdtemp(prefix=".", dir=parent))
        try:
            building.chmod(0o755)
            for name, blob in snapshot.files.items():
                link = building / PurePosixPath(name)
                link.parent.mkdir(parents=True, exist_ok=True)
                # Relative, so that the cache may be moved; counted from where the link ends up.
                depth = len(PurePosixPath(name).parts) + 2
                link.symlink_to(Path(*[".."] * depth, "blobs", blob.sha256))
            if target.exists():  # links were removed by hand
                shutil.rmtree(target)
            os.rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return target
