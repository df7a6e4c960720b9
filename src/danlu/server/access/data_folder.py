"""Where the server keeps what it has to remember: the database and, unless another file is named, the keys."""

from __future__ import annotations

from pathlib import Path

from danlu import files

DATABASE = "server.sqlite3"
KEY_FILE = "keys.json"


def data_folder(given: Path | None) -> Path:
    """The server's data folder: the one that was given, else the folder ``server`` of danlu's cache."""
    return given if given is not None else files.cache_home() / "server"


def database_path(data: Path | None) -> Path:
    """The database in a data folder (None: the default one)."""
    return data_folder(data) / DATABASE


def key_file_path(api_key_file: Path | None, data: Path | None) -> Path:
    """The file of keys: the one that was given, else ``keys.json`` in the data folder."""
    return api_key_file if api_key_file is not None else data_folder(data) / KEY_FILE
