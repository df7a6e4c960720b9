"""Options of `danlu keys`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from danlu.config import REQUIRED, option
from danlu.server.access.key_file import Limits, name_problems
from danlu.server.config import DATA_HELP, KEYS_HELP


@dataclass(frozen=True, kw_only=True)
class KeyFileConfig:
    """Which file of keys."""

    api_key_file: Path | None = option(None, KEYS_HELP)
    data: Path | None = option(None, DATA_HELP)


@dataclass(frozen=True, kw_only=True)
class CreateKeyConfig(Limits, KeyFileConfig):
    """What `danlu keys create` takes."""

    name: str = option(REQUIRED, "What to call the key, in lists, logs and usage.", positional=True)
    models: tuple[str, ...] = option(
        (), "Models that the key may use, as a,b, each with its adapters, or an adapter alone, as a:name; none: all."
    )

    def problems(self) -> list[str]:
        """A name that is none, models without a name."""
        found = name_problems(self.name)
        if any(not model for model in self.model_names() or ()):
            found.append("models: holds an empty name; write them as a,b")
        return found

    def model_names(self) -> tuple[str, ...] | None:
        """The models one by one; None: all."""
        return tuple(name.strip() for text in self.models for name in text.split(",")) or None

    def limits(self) -> Limits:
        """How much the key may use."""
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


@dataclass(frozen=True, kw_only=True)
class ListKeysConfig(KeyFileConfig):
    """What `danlu keys list` takes."""

    json: bool = option(False, "Print JSON instead of a table.")


@dataclass(frozen=True, kw_only=True)
class RevokeKeyConfig(KeyFileConfig):
    """What `danlu keys revoke` takes."""

    name: str = option(REQUIRED, "The key's name.", positional=True)


@dataclass(frozen=True, kw_only=True)
class KeysUsageConfig(KeyFileConfig):
    """What `danlu keys usage` takes."""

    json: bool = option(False, "Print JSON instead of a table.")
