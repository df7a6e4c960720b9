"""Options of `danlu data build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option


@dataclass(frozen=True)
class DataConfig:
    """How to make a data folder out of a pile of files."""

    corpus: tuple[str, ...] = option(
        REQUIRED,
        "Files, folders, globs, or the word `stdlib` (the Python standard library's source on this disk). "
        "PATH::WEIGHT sees that source WEIGHT times in the training split (2 = twice, 0.5 = every second document).",
        positional=True,
        affects_result=False,  # names, weights and contents are in the fingerprint of the input
    )
    out: Path = option(REQUIRED, "Data folder to make.", affects_result=False)

    include: tuple[str, ...] = option(
        (), "Only files whose path or name matches one of these globs (empty: all known kinds)."
    )
    exclude: tuple[str, ...] = option((), "No files or folders whose path or name matches one of these globs.")
    encoding: str = option("utf-8", "Encoding of text files without a byte order mark or PEP 263 cookie.")
    text_field: str = option(
        "", "Column that holds the text of JSON, CSV and Parquet rows (empty: `text` or `content`, or a chat)."
    )
    separator: str = option("", "Cut plain text files into documents wherever this text stands, e.g. '<|endoftext|>'.")
    text_type: Literal["auto", "prose", "code"] = option(
        "auto", "Which filters a text gets: `auto` takes source files for code and the rest for prose."
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "What to do about a broken row or unreadable file; `skip` counts it."
    )

    filters: tuple[str, ...] = option((), "Run only these filters (empty: all).")
    skip_filters: tuple[str, ...] = option((), "Leave out these filters.")
    min_chars: int = option(40, "Shorter documents are removed by the filter `length`.", unit="characters", ge=0)
    languages: tuple[str, ...] = option(
        (), "Keep only prose in these languages, as ISO 639-1 codes such as en or zh (empty: all)."
    )

    dedup: Literal["near", "exact", "off"] = option("near", "Remove exact copies, or also near-duplicates (MinHash).")
    dedup_threshold: float = option(
        0.8, "Documents at least this alike (Jaccard similarity of word 3-grams) are near-duplicates.", ge=0.5, le=1
    )

    heldout: float = option(0.05, "Share of the documents kept out of training for measuring; 0 for none.", ge=0, lt=1)
    seed: int = option(0, "Seed of the split, of sampling by weight and of the order of documents.", ge=0)
    max_chars: int = option(
        100_000,
        "Longer documents are cut on definitions, headings, paragraphs or sentences.",
        unit="characters",
        ge=100,
    )
    shard_mb: int = option(256, "Text in one Parquet shard, before compression.", unit="MB", ge=1)
    overwrite: bool = option(False, "Replace another danlu result in the output folder.", affects_result=False)

    def problems(self) -> list[str]:
        """Checks between fields and of names that are cheap to check early."""
        from danlu.data.cleaning import FILTER_NAMES
        from danlu.data.corpus import split_weight

        found = []
        if not self.corpus:
            found.append("corpus: is empty; name a file, a folder, a glob or `stdlib`")
        for entry in self.corpus:
            try:
                split_weight(entry)
            except ValueError as error:
                found.append(f"corpus: {error}")
        for language in self.languages:
            if not (language.isascii() and language.islower() and len(language) == 2):
                found.append(f"languages: {language!r} is not an ISO 639-1 code, such as en or zh")
        for key in ("filters", "skip_filters"):
            for name in getattr(self, key):
                if name not in FILTER_NAMES:
                    found.append(f"{key}: no filter is called {name!r}; there are {', '.join(FILTER_NAMES)}")
        try:
            "a".encode(self.encoding)
        except LookupError:
            found.append(
                f"encoding: Python knows no text encoding {self.encoding!r}; for example utf-8, latin-1, gb18030"
            )
        return found
