"""Options of whatever has answers judged. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from danlu.config import option


@dataclass(frozen=True, kw_only=True)
class SandboxOptions:
    """What a verifier may use up while it judges an answer."""

    sandbox_seconds: float = option(5.0, "Time of a verifier for an answer.", unit="seconds", gt=0, le=600)
    sandbox_memory: int = option(512, "Memory of a verifier for an answer.", unit="MiB", ge=128)
    allow_weak_sandbox: bool = option(
        False, "Run code of answers although this machine cannot lock it in; see `danlu doctor`."
    )
