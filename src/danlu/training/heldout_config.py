"""Options of whatever is learned from rows of files, some of which are held out. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import option


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """Which rows are held out, and what becomes of those that cannot be used."""

    heldout: Path | None = option(
        None,
        "File of held-out rows; without it, a folder's test, dev or validation files, else a share of the rows.",
    )
    heldout_share: float | None = option(
        None,
        "Share of the rows held out, by a hash; default 0.1, of chats and texts that are learned as they are 0.02.",
        ge=0,
        lt=1,
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "What to do with a row that cannot be used: stop, or skip and count it."
    )

    def heldout_problems(self) -> list[str]:
        """What cannot be right between these options."""
        if self.heldout is not None and self.heldout_share is not None:
            return ["heldout and heldout_share are both given; choose one"]
        return []
