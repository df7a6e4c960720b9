"""What a corpus is on disk: which files belong to it, under which names, with which weights and fingerprint."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import math
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from danlu import files
from danlu.errors import DanluError
from danlu.formats.card import CARD, RUN

Format = Literal["text", "code", "jsonl", "json", "csv", "tsv", "parquet", "html", "pdf"]

_CODE = """
    bash c cc cl clj cpp cs css cu cuh cxx dart el erl ex exs f f90 fish fs go gradle groovy h hh hpp hs hxx java jl
    js jsx kt kts lean less lisp lua m ml mli mm nim pas php pl pm proto ps1 py pyi pyx r rb rs s sass scala scm scss
    sh sol sql svelte swift tcl thrift toml ts tsx v vb vhd vim vue yaml yml zig zsh
"""
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".adoc", ".org"), "text"),
    **dict.fromkeys((f".{suffix}" for suffix in _CODE.split()), "code"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pdf": "pdf",
}
"""How a file is read, by its suffix (before ``.gz`` or ``.zst``)."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}

PASSED_OVER = {"__pycache__", "node_modules", "site-packages", "dist-packages", CARD, RUN}
STDLIB_TESTS = ("test", "tests", "idle_test", "idlelib", "bad_coding.py", "bad_coding2.py")
"""Left out of `stdlib`: tests hold broken sources on purpose, and IDLE is an application."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus. ``name`` is its path relative to the source, with forward slashes."""

    path: Path
    name: str
    format: Format
    compression: str | None = None


@dataclass
class Source:
    """One entry of the corpus list. ``ignored`` counts files of unknown kinds by suffix."""

    entry: str
    name: str
    weight: float
    files: list[SourceFile]
    ignored: dict[str, int] = field(default_factory=dict)


class ErrorPolicy:
    """What happens to an error about a single row or file: it stops the run, or is counted and the run goes on.

    ``count`` is the number of errors skipped, ``messages`` the first of them.
    """

    def __init__(self, on_error: Literal["stop", "skip"]) -> None:
        self.on_error = on_error
        self.count = 0
        self.messages: list[str] = []

    def __call__(self, error: DanluError) -> None:
        """Raise or count ``error``."""
        if self.on_error == "stop":
            raise error
        self.count += 1
        if len(self.messages) < 20:
            self.messages.append(str(error))


def split_weight(entry: str) -> tuple[str, float]:
    """``"path::2"`` -> ``("path", 2.0)``; the weight is 1 where none is given. ValueError for a weight that is none."""
    path, separator, text = entry.rpartition("::")
    if not separator:
        return entry, 1.0
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"{entry!r}: {text!r} is not a weight; write PATH::2 or PATH::0.5") from None
    if not math.isfinite(weight) or not 0 < weight <= 100:
        raise ValueError(f"{entry!r}: the weight must be more than 0 and at most 100")
    return path, weight


def find_sources(
    corpus: Sequence[str], include: Sequence[str], exclude: Sequence[str], on_error: Callable[[DanluError], None]
) -> list[Source]:
    """Resolve every entry of a corpus into its files, in a fixed order.

    Hidden files and folders, ``__pycache__``, ``node_modules``, ``site-packages`` and folders below that danlu made
    are passed over; links are followed.

    Raises:
        DanluError: an entry does not exist or holds no file of a known kind; a link is broken or leads in a circle.
    """
    sources: list[Source] = []
    for entry in corpus:
        path, weight = split_weight(entry)
        name, found = _files_of(path, exclude, on_error)
        source = Source(path, _unused(name, [source.name for source in sources]), weight, [])
        for file_path, relative, is_named in found:
            wanted = not include or _matches(relative, include)
            if not wanted or _matches(relative, exclude):
                continue
            suffixes = [suffix.lower() for suffix in Path(relative).suffixes]
            compression = COMPRESSED.get(suffixes.pop()) if suffixes and suffixes[-1] in COMPRESSED else None
            known = FORMATS.get(suffixes[-1] if suffixes else "")
            if known is None and not include and not is_named:
                suffix = suffixes[-1] if suffixes else "no suffix"
                source.ignored[suffix] = source.ignored.get(suffix, 0) + 1
                continue
            source.files.append(SourceFile(file_path, relative, known or "text", compression))
        if not source.files:
            ignored = ", ".join(f"{count} {suffix}" for suffix, count in sorted(source.ignored.items()))
            raise DanluError(
                f"{path}: holds no file to read{f' ({ignored} passed over)' * bool(ignored)}; known kinds are text, "
                "source code, JSONL, JSON, CSV, Parquet, HTML and PDF; others are read as text with --include"
            )
        sources.append(source)
    return sources


def fingerprint(source: Source) -> str:
    """Hex digest of the name and weight of a source and of the names and contents of everything that will be read of
    it.
    """
    digest = hashlib.sha256(f"{source.name}\0{source.weight}\n".encode())
    for file in source.files:
        digest.update(f"{file.name}\0{_content_hash(file.path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _content_hash(path: Path) -> str:
    """SHA-256 of a file, or a mark for one that cannot be read (the reader tells the user, or skips it)."""
    try:
        return files.sha256_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _files_of(
    path: str, exclude: Sequence[str], on_error: Callable[[DanluError], None]
) -> tuple[str, Iterator[tuple[Path, str, bool]]]:
    """The name of a source and its (path, relative name, named by the user) triples."""
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        if not (root / "os.py").is_file():
            raise DanluError(f"stdlib: {root} holds no Python sources; name a folder of your own")
        found = _walk(root, root, (*exclude, *STDLIB_TESTS), on_error, [])
        return "stdlib", ((file, name, False) for file, name in found if name.endswith(".py"))
    target = Path(path).expanduser()
    if target.is_dir():
        name = target.resolve().name or "root"
        return name, ((file, relative, False) for file, relative in _walk(target, target, exclude, on_error, []))
    if target.is_file():
        return target.name, iter([(target, target.name, True)])
    if glob.has_magic(path):
        pattern = str(target)
        matched = sorted(Path(m) for m in glob.glob(pattern, recursive=True) if os.path.isfile(m))
        if not matched:
            raise DanluError(f"{path}: matches no file; quote the pattern and use ** for folders below")
        fixed = list(_before_magic(Path(pattern).parts[:-1]))
        root = Path(*fixed) if fixed else Path()
        return root.resolve().name or "root", ((m, m.relative_to(root).as_posix(), True) for m in matched)
    if target.is_symlink():
        raise DanluError(f"{path}: is a broken or circular symbolic link; mend or remove it")
    if target.exists():
        raise DanluError(f"{path}: is neither a file nor a folder (a pipe, socket or device?)")
    raise DanluError(f"{path}: does not exist; name a file, a folder, a glob or `stdlib`")


def _before_magic(parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _walk(
    folder: Path, root: Path, exclude: Sequence[str], on_error: Callable[[DanluError], None], above: list[str]
) -> Iterator[tuple[Path, str]]:
    """Regular files below ``folder``, sorted by name; ``above`` are the real paths of the folders on the way down."""
    try:
        real = os.path.realpath(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        on_error(DanluError(f"{folder}: cannot be listed ({error.strerror}); mend its permissions, or --exclude it"))
        return
    for entry in entries:
        path = folder / entry.name
        relative = path.relative_to(root).as_posix()
        if entry.name.startswith(".") or entry.name in PASSED_OVER or _matches(relative, exclude):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            on_error(DanluError(f"{path}: is a link that leads nowhere ({error.strerror}); remove it, or --exclude it"))
            continue
        if stat.S_ISDIR(mode):
            if (path / CARD).exists() or (path / RUN).exists():  # made by danlu, maybe out of this very corpus
                continue
            if entry.is_symlink() and os.path.realpath(path) in (*above, real):
                on_error(
                    DanluError(f"{path}: is a link to a folder that holds it, a circle; remove it, or --exclude it")
                )
                continue
            yield from _walk(path, root, exclude, on_error, [*above, real])
        elif stat.S_ISREG(mode):
            yield path, relative


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    name = relative.rpartition("/")[2]
    return any(fnmatch.fnmatch(relative, pattern) or fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _unused(name: str, taken: Sequence[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
