"""`danlu keys`: make, list and revoke the keys of a server, and see what each has used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import time
from typing import Any

from danlu.config import validate
from danlu.console import note
from danlu.console import out as stdout
from danlu.errors import DanluError
from danlu.server.access.data_folder import database_path, key_file_path
from danlu.server.access.key_file import Key, add_key, end_key, read_keys
from danlu.server.access.keys_config import (
    CreateKeyConfig,
    KeyFileConfig,
    KeysUsageConfig,
    ListKeysConfig,
    RevokeKeyConfig,
)


def create_key(config: CreateKeyConfig) -> str:
    """Make a key and print it, this once; return it.

    Raises:
        DanluError: a valid key has this name already, or the file cannot be read or written.
    """
    config = validate(config)
    path = key_file_path(config.api_key_file, config.data)
    key, secret = add_key(path, config.name, models=config.model_names(), limits=config.limits())
    stdout().print(secret, markup=False)
    note(f"The key {key.name!r}, shown only now: {path} keeps its hash. A running server knows it within a second")
    return secret


def list_keys(config: ListKeysConfig) -> list[dict[str, Any]]:
    """Print the keys, without their hashes; return them.

    Raises:
        DanluError: the file cannot be read.
    """
    keys = _keys(validate(config))
    rows = []
    for key in keys:
        row = dataclasses.asdict(key)
        del row["sha256"]
        rows.append(row)
    if config.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _print_table(["key", "models", "limits", "made", "revoked"], [_described(key) for key in keys])
    return rows


def revoke_key(config: RevokeKeyConfig) -> None:
    """Make a key invalid; a running server refuses it within a second.

    Raises:
        DanluError: there is no valid key of this name, or the file cannot be read or written.
    """
    config = validate(config)
    path = key_file_path(config.api_key_file, config.data)
    if not path.exists():
        raise _no_file(path)
    key = end_key(path, config.name)
    note(f"The key {key.name!r} is revoked. What it has used stays in `danlu keys usage`")


def keys_usage(config: KeysUsageConfig) -> list[dict[str, Any]]:
    """Print what each key has used, today (UTC) and altogether; return it.

    Raises:
        DanluError: there is no database, or it cannot be read.
    """
    from danlu.server.access.database import open_to_read  # these need the server's packages, and keys are made without
    from danlu.server.access.usage import Used, day_of, used_by_key

    config = validate(config)
    path = database_path(config.data)
    try:
        with contextlib.closing(open_to_read(path)) as connection:
            today, total = used_by_key(connection, day_of(time.time())), used_by_key(connection)
    except sqlite3.Error as error:
        raise DanluError(f"{path}: cannot be read ({error}); name the server's folder with --data") from error
    file = key_file_path(config.api_key_file, config.data)
    names = {key.id: key for key in read_keys(file)} if file.exists() else {}
    rows = [
        {
            "id": key_id,
            "name": names[key_id].name if key_id in names else key_id,
            "revoked": names[key_id].revoked is not None if key_id in names else None,
            "today": dataclasses.asdict(today.get(key_id, Used())),
            "total": dataclasses.asdict(total.get(key_id, Used())),
        }
        for key_id in sorted({*names, *total}, key=lambda one: names[one].name if one in names else one)
    ]
    if config.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        columns = [
            "key",
            *(f"{what} {when}" for when in ("today", "in all") for what in ("requests", "prompt", "answer")),
        ]
        _print_table(columns, [_counted(row) for row in rows])
    return rows


def _keys(config: KeyFileConfig) -> list[Key]:
    path = key_file_path(config.api_key_file, config.data)
    if not path.exists():
        raise _no_file(path)
    return read_keys(path)


def _no_file(path: object) -> DanluError:
    return DanluError(f"{path}: does not exist; `danlu keys create NAME` makes it, --api-key-file names another")


def _described(key: Key) -> list[str]:
    limits = [
        f"{limit:,} {what}"
        for limit, what in (
            (key.requests_per_minute, "requests a minute"),
            (key.tokens_per_minute, "tokens a minute"),
            (key.tokens_per_day, "tokens a day"),
            (key.tokens_total, "tokens in all"),
        )
        if limit is not None
    ]
    models = "all" if key.models is None else ", ".join(key.models)
    return [key.name, models, ", ".join(limits) or "none", key.created[:10], key.revoked[:10] if key.revoked else "-"]


def _counted(row: dict[str, Any]) -> list[str]:
    name = row["name"] + (" (revoked)" if row["revoked"] else "")
    counts = ("requests", "prompt_tokens", "completion_tokens")
    return [name, *(f"{row[when][count]:,}" for when in ("today", "total") for count in counts)]


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        numbers = bool(rows) and number > 0 and all(row[number].replace(",", "").isdecimal() for row in rows)
        table.add_column(column, justify="right" if numbers else "left", min_width=len("2026-11-22"))
    for row in rows:
        table.add_row(*map(Text, row))  # a name in [brackets] is no markup
    stdout().print(table)
