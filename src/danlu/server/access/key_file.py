"""The file of API keys: who may use the server, and how much.

A key is 256 random bits. Only its SHA-256 is kept: nobody can try so many keys, so the slow hashes that protect
guessable passwords would only make each request dearer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from danlu import config as configs
from danlu import files
from danlu.config import REQUIRED, option
from danlu.errors import DanluError, Problems

PREFIX = "sk-danlu-"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a key may use; none: as much as the server gives."""

    requests_per_minute: int | None = option(None, "Requests in any 60 seconds.", ge=1)
    tokens_per_minute: int | None = option(None, "Tokens of prompts and answers in any 60 seconds.", ge=1)
    tokens_per_day: int | None = option(None, "Tokens of prompts and answers in a day (UTC).", ge=1)
    tokens_total: int | None = option(None, "Tokens of prompts and answers altogether.", ge=1)


@dataclass(frozen=True, kw_only=True)
class Key(Limits):
    """A key as it is kept."""

    id: str = option(REQUIRED, "What usage, conversations and responses are kept under; never used again.")
    name: str = option(REQUIRED, "What people call it.")
    sha256: str = option(REQUIRED, "SHA-256 of the key, in hex.")
    created: str = option(REQUIRED, "When it was made (ISO 8601, UTC).")
    revoked: str | None = option(None, "When it was revoked; none: it is valid.")
    models: tuple[str, ...] | None = option(None, "Models that it may use; none: all.")

    def problems(self) -> list[str]:
        """A name or a hash that is none."""
        found = name_problems(self.name)
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            found.append("sha256: must be 64 hex digits")
        if not re.fullmatch(r"[\w-]{1,64}", self.id, re.ASCII):
            found.append("id: must be up to 64 letters, digits, - and _")
        return found


def name_problems(name: str) -> list[str]:
    """Why a key cannot be called so: names stand in logs and tables."""
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        return ["name: must be 1 to 64 visible characters, without spaces around them"]
    return []


def hash_key(secret: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """All keys of a file, revoked ones too.

    Raises:
        DanluError: the file cannot be read, or is no file of keys; what is wrong is told all at once.
    """
    try:
        content = files.read_json(path)
    except (ValueError, RecursionError) as error:  # a number or a nesting that Python's parser gives up on
        raise DanluError(f"{path}: is not valid JSON ({error})") from error
    hint = "restore a backup, or move it away and make new keys with `danlu keys create`"
    if not isinstance(content, dict) or not isinstance(content.get("keys"), list):
        raise DanluError(f"{path}: is no file of keys; {hint}")
    if content.get("version") != VERSION:
        raise DanluError(f"{path}: has version {content.get('version')!r}, this danlu knows {VERSION}; update danlu")
    keys, problems = [], []
    for number, row in enumerate(content["keys"]):
        try:
            if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
                raise Problems("", ["is no key"])
            keys.append(configs.load(Key, values=row))
        except Problems as error:
            problems += [f"keys.{number}: {problem}" for problem in error.problems]
    valid = [key.name for key in keys if key.revoked is None]
    problems += [f"two valid keys are called {name!r}" for name in sorted({n for n in valid if valid.count(n) > 1})]
    ids = [key.id for key in keys]
    problems += [f"two keys have the id {one!r}" for one in sorted({i for i in ids if ids.count(i) > 1})]
    if problems:
        raise Problems(f"{path}: cannot be used; {hint}:", problems)
    return keys


def add_key(path: Path, name: str, *, models: tuple[str, ...] | None = None, limits: Limits) -> tuple[Key, str]:
    """Add a key to a file, which is made if need be.

    Returns:
        The key as it is kept, and the secret, which is kept nowhere.

    Raises:
        DanluError: a valid key has this name already, or the file cannot be read or written.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    key = Key(
        id=f"key_{secrets.token_hex(8)}",
        name=name,
        sha256=hash_key(secret.encode()),
        created=_now(),
        models=models,
        **configs.to_dict(limits),
    )
    configs.validate(key)
    with _locked(path) as target:
        keys = read_keys(target) if target.exists() else []
        if any(one.name == name and one.revoked is None for one in keys):
            raise DanluError(f"{path}: there is a key {name!r} already; choose another name, or revoke that one first")
        _write(target, [*keys, key])
    return key, secret


def end_key(path: Path, name: str) -> Key:
    """Make a key invalid. It stays in the file, so that its usage keeps a name.

    Raises:
        DanluError: there is no valid key of this name, or the file cannot be read or written.
    """
    with _locked(path) as target:
        keys = read_keys(target)
        for number, key in enumerate(keys):
            if key.name == name and key.revoked is None:
                keys[number] = replace(key, revoked=_now())
                _write(target, keys)
                return keys[number]
    valid = ", ".join(repr(key.name) for key in keys if key.revoked is None) or "none"
    raise DanluError(f"{path}: there is no valid key {name!r}; there are: {valid}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Keep others from changing the file; yields where it really is, since a link must not be replaced by a file."""
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(target.with_name(f".{target.name}.lock"), "wb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise files.as_user_error(error, path) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield target


def _write(path: Path, keys: list[Key]) -> None:
    files.write_json(path, {"version": VERSION, "keys": [_row(key) for key in keys]}, mode=0o600)


def _row(key: Key) -> Mapping[str, Any]:
    plain = configs.to_dict(key)
    first = ("id", "name", "sha256", "created")
    return {name: plain[name] for name in first} | {
        name: value for name, value in plain.items() if name not in first and value is not None
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
