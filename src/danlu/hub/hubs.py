"""Repositories on Hugging Face and ModelScope, through their own libraries (which resume interrupted downloads)."""

from __future__ import annotations

import glob
import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from danlu import files
from danlu.console import note
from danlu.errors import DanluError, MissingExtra
from danlu.hub.cache import Blob, Cache, Snapshot, safe_relative
from danlu.hub.sources import HubSource

MODEL_FILES = (
    *(
        "*.safetensors",
        "*.gguf",
        "*.onnx",
        "*.onnx_data",
        "*.json",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "*.jinja",
        "*.md",
    ),
    *("LICENSE*", "NOTICE*"),
)
"""What is fetched of a model. Pickled weights (.bin, .pt, .ckpt) are not: loading them runs code."""

DATASET_FILES = (
    *("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt", "*.md", "*.html", "*.pdf", "*.gz", "*.zst"),
    *("LICENSE*", "NOTICE*"),
)


class HubUnreachable(DanluError):
    """The hub did not answer; what was fetched before may still be used."""


def fetch_repository(source: HubSource, cache: Cache, held: Snapshot | None) -> Snapshot:
    """Fetch a repository's files, except those the cache already has.

    Args:
        held: what the source resolved to last time.

    Raises:
        HubUnreachable: no answer.
        DanluError: no such repository or revision, no right to read it, or nothing in it that danlu reads.
    """
    if source.hub == "hf":
        return _fetch_huggingface(source, cache, held)
    return _fetch_modelscope(source, cache)


def wanted(source: HubSource, names: list[str]) -> list[str]:
    """Those of a repository's files that danlu fetches."""
    patterns = DATASET_FILES if source.is_dataset else MODEL_FILES
    chosen = [name for name in names if any(fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in patterns)]
    # A README alone is not a model.
    if all(fnmatch(name, "*.md") or name.startswith(("LICENSE", "NOTICE")) for name in chosen):
        seen = ", ".join(names[:5]) or "no files"
        raise DanluError(
            f"{source}: holds nothing danlu reads (it holds {seen}); weights must be safetensors, GGUF or ONNX, "
            "not pickles"
        )
    return [safe_relative(name) for name in chosen]


def _fetch_huggingface(source: HubSource, cache: Cache, held: Snapshot | None) -> Snapshot:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the HTTP library it is built on, which differs between its versions
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kind = "dataset" if source.is_dataset else "model"
    info: ModelInfo | DatasetInfo
    try:
        look_up = HfApi().dataset_info if source.is_dataset else HfApi().model_info
        info = look_up(source.repo, revision=source.revision, files_metadata=True)
        listed = {sibling.rfilename: sibling for sibling in info.siblings or []}
        names = wanted(source, list(listed))
        commit = str(info.sha)
        known: dict[str, Blob] = held.files if held is not None and held.revision == commit else {}
        known = {name: known[name] for name in names if name in known}
        for name in names:
            if (lfs := listed[name].lfs) is not None:
                known[name] = Blob(lfs.sha256, lfs.size)
        absent = [name for name in names if name not in known or not cache.blob(known[name].sha256).exists()]
        folder = cache.partial(str(source))
        if absent:
            size = sum(listed[name].size or 0 for name in absent)
            files.require_space(cache.root, size, str(source))
            note(f"{source}: fetching {len(absent)} files, {files.human_bytes(size)}")
            patterns = [glob.escape(name) for name in absent]
            snapshot_download(source.repo, repo_type=kind, revision=commit, local_dir=folder, allow_patterns=patterns)
    except GatedRepoError as error:
        raise DanluError(f"{source}: is gated; accept its terms on the hub's page and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise DanluError(
            f"{source}: the hub has no such repository, or it is private; check the name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise DanluError(
            f"{source}: has no revision {source.revision!r}; name a branch, tag or commit of it"
        ) from error
    except HFValidationError as error:
        raise DanluError(f"{source}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise HubUnreachable(f"{source}: HF_HUB_OFFLINE is set; unset it to fetch from the hub") from error
    except HfHubHTTPError as error:
        raise HubUnreachable(f"{source}: the hub refused ({_one_line(error)}); try again later") from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise HubUnreachable(
            f"{source}: the hub cannot be reached ({_one_line(error)}); check the network or name a mirror "
            "in HF_ENDPOINT, then run the same command again: it goes on where it stopped"
        ) from error
    except OSError as error:
        raise files.as_user_error(error, cache.root) from error
    blobs = {}
    for name in names:
        if name in absent:
            path = folder / name
            if listed[name].lfs is None:
                _check_git_hash(source, path, listed[name].blob_id)
            blobs[name] = cache.adopt(path, known[name].sha256 if name in known else None)
        else:
            blobs[name] = known[name]
    cache.drop_partial(str(source))
    return Snapshot(str(source), commit, blobs)


def _check_git_hash(source: HubSource, path: Path, blob_id: str | None) -> None:
    """Small files are listed with git's hash of them; the hub's library checks their size only."""
    content = path.read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if blob_id is not None and found != blob_id:
        path.unlink()
        raise DanluError(f"{source}: {path.name} was damaged on the way; run the same command again")


def _fetch_modelscope(source: HubSource, cache: Cache) -> Snapshot:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise MissingExtra("modelscope", "modelscope", str(source)) from error

    folder = cache.partial(str(source))
    options: dict[str, Any] = {"revision": source.revision} if source.revision else {}
    patterns = list(DATASET_FILES if source.is_dataset else MODEL_FILES)
    note(f"{source}: fetching")
    try:
        snapshot_download(
            source.repo,
            repo_type="dataset" if source.is_dataset else "model",
            local_dir=str(folder),
            allow_patterns=patterns,
            **options,
        )
    except Exception as error:  # its errors have no common base below Exception and changed between versions
        raise HubUnreachable(
            f"{source}: ModelScope did not give it ({_one_line(error)}); check the name, the revision and the network"
        ) from error
    loose = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    by_name = {p.relative_to(folder).as_posix(): p for p in loose if not p.relative_to(folder).parts[0].startswith(".")}
    blobs = {name: cache.adopt(by_name[name]) for name in wanted(source, list(by_name))}
    cache.drop_partial(str(source))
    return Snapshot(str(source), source.revision or "master", blobs)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
