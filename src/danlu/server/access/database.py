"""What the server remembers, in SQLite. One thread owns the connection; handlers hand it work and wait."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from danlu import files
from danlu.errors import DanluError
from danlu.server.errors import ApiError

T = TypeVar("T")

VERSION = 1
"""Kept in ``PRAGMA user_version``; a change of the tables that older versions cannot live with counts it up."""

BUSY_SECONDS = 10.0
"""How long to wait for another process (`danlu keys usage`, a backup) that holds a lock."""

_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_NO_RIGHTS = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_FAILURES = _DAMAGED | _NO_ROOM | _NO_RIGHTS | _BUSY
"""What goes wrong with the file, not with the work."""


class Database:
    """A SQLite database with write-ahead log: what was committed outlives the death of the process.

    ``synchronous=NORMAL``: only a power cut can lose the last transactions, and never tears one. One server owns the
    file at a time, so that what it keeps in memory (quotas, sessions) stays true.

    Args:
        path: the file, made with its folder if need be; None: in memory.
        tables: ``CREATE TABLE IF NOT EXISTS ...`` scripts of the modules that use it.

    Raises:
        DanluError: a newer danlu made the file, it is damaged, it cannot be written, or another server has it.
    """

    def __init__(self, path: Path | None, tables: Sequence[str] = ()) -> None:
        self.path = path
        self._lock = _claim(path) if path is not None else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        try:
            self._connection = self._thread.submit(_open, path, tables).result()
        except BaseException:
            self._thread.shutdown()
            self._let_go()
            raise

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """``work(connection)`` in the database's thread.

        Raises:
            ApiError: 503, the database failed.
        """
        return await self._run(work, self._told)

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """``work(connection)`` as one transaction, committed when this returns and rolled back when it raises.

        It is carried out even if the caller is cancelled meanwhile, so that an answer that a client left is counted.

        Raises:
            ApiError: 503, the database failed.
        """
        return await self._run(work, self._transaction)

    async def close(self) -> None:
        """Ends after the work that was handed in before."""
        await asyncio.wrap_future(self._thread.submit(self._connection.close))
        self._thread.shutdown()
        self._let_go()

    async def _run(
        self, work: Callable[[sqlite3.Connection], T], how: Callable[[Callable[[sqlite3.Connection], T]], T]
    ) -> T:
        return await asyncio.shield(asyncio.wrap_future(self._thread.submit(how, work)))

    def _told(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return work(self._connection)
        except sqlite3.DatabaseError as error:
            if _code(error) not in _FAILURES:
                raise  # a mistake of ours
            raise ApiError(503, f"the server's database failed: {error}", code="database_failed") from error

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have rolled it back already
                    connection.execute("ROLLBACK")
                raise
            return result

        return self._told(run)

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection for looking into the database of a server, which may be running.

    Raises:
        DanluError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise DanluError(f"{path}: does not exist; `danlu serve` makes it. Name the server's folder with --data")
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
        _require_version(connection, path)
    except sqlite3.Error as error:
        raise _user_error(error, path) from error
    return connection


def _claim(path: Path) -> IO[str]:
    """Lock a file beside the database; the system lets go of it when the process ends, however it ends.

    The database itself cannot be locked so: to close another handle of it would drop SQLite's own locks.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(folder / f"{path.name}.lock", "a+", encoding="utf-8")  # noqa: SIM115  (held while the server runs)
    except (FileExistsError, NotADirectoryError) as error:
        raise DanluError(f"{folder}: is a file, not a folder; choose another --data") from error
    except OSError as error:
        raise files.as_user_error(error, folder) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists():  # conversations are nobody else's business; SQLite gives its other files the same mode
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        process = lock.read(20).strip()
        lock.close()
        raise DanluError(
            f"{path}: another danlu server uses it{f' (process {process})' if process else ''}; "
            "stop that one, or give this one a folder of its own with --data"
        ) from None
    except OSError as error:
        lock.close()
        raise files.as_user_error(error, path) from error
    return lock


def _open(path: Path | None, tables: Sequence[str]) -> sqlite3.Connection:
    connection = None
    try:
        connection = sqlite3.connect(path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        _require_version(connection, path)
        connection.executescript(
            "\n".join(["BEGIN IMMEDIATE;", *tables, f"PRAGMA user_version = {VERSION};", "COMMIT;"])
        )
    except (sqlite3.Error, DanluError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, DanluError) or path is None:
            raise
        raise _user_error(error, path) from error
    return connection


def _require_version(connection: sqlite3.Connection, path: Path | None) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise DanluError(
            f"{path}: was made by a newer danlu (format {version}, this one knows {VERSION}); update danlu, "
            "or name another folder with --data"
        )


def _user_error(error: sqlite3.Error, path: Path) -> DanluError:
    """What SQLite says of a file, in words a user can act on."""
    code = _code(error)
    if code in _DAMAGED:
        return DanluError(f"{path}: is damaged, or no database of danlu ({error}); move it away or restore a backup")
    if code in _NO_ROOM:
        return DanluError(f"{path}: cannot be written, the disk may be full ({error}); make room and start again")
    if code in _NO_RIGHTS:
        return DanluError(f"{path}: cannot be opened ({error}); mend the rights of it and its folder, or use --data")
    if code in _BUSY:
        return DanluError(f"{path}: another program holds it locked; end that one and start again")
    return DanluError(f"{path}: cannot be used as the server's database ({error}); name another folder with --data")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, without its extension."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
