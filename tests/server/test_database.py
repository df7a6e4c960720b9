"""The server's SQLite: what is committed stays, what is wrong with the file is told."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.server.access import database as module
from danlu.server.access.database import Database, open_to_read
from danlu.server.errors import ApiError

TABLE = "CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT UNIQUE);"


def insert(text: str) -> module.Callable[[sqlite3.Connection], int | None]:
    return lambda connection: connection.execute("INSERT INTO notes (text) VALUES (?)", (text,)).lastrowid


def texts(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT text FROM notes ORDER BY id")]


def test_what_is_written_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "new" / "server.sqlite3"

    async def first() -> None:
        database = Database(path, [TABLE])
        assert await database.write(insert("one")) == 1
        await database.close()

    async def second() -> list[str]:
        database = Database(path, [TABLE])
        try:
            return await database.read(texts)
        finally:
            await database.close()

    asyncio.run(first())
    assert asyncio.run(second()) == ["one"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_write_that_fails_leaves_nothing() -> None:
    async def run() -> list[str]:
        database = Database(None, [TABLE])
        await database.write(insert("one"))

        def half(connection: sqlite3.Connection) -> None:
            insert("two")(connection)
            insert("one")(connection)

        with pytest.raises(sqlite3.IntegrityError):
            await database.write(half)
        await database.write(insert("three"))
        found = await database.read(texts)
        await database.close()
        return found

    assert asyncio.run(run()) == ["one", "three"]


def test_a_write_is_carried_out_although_its_caller_is_cancelled() -> None:
    async def run() -> list[str]:
        database = Database(None, [TABLE])
        writes = [asyncio.create_task(database.write(insert(str(number)))) for number in range(50)]
        await asyncio.sleep(0)
        for write in writes:
            write.cancel()
        await asyncio.gather(*writes, return_exceptions=True)
        assert all(write.cancelled() for write in writes)
        found = await database.read(texts)
        await database.close()
        return found

    assert asyncio.run(run()) == [str(number) for number in range(50)]


def test_close_waits_for_what_was_handed_in(tmp_path: Path) -> None:
    async def run() -> None:
        database = Database(tmp_path / "a.sqlite3", [TABLE])
        writes = [asyncio.create_task(database.write(insert(str(number)))) for number in range(50)]
        await asyncio.sleep(0)
        await database.close()
        await asyncio.gather(*writes)

    asyncio.run(run())
    assert len(texts(open_to_read(tmp_path / "a.sqlite3"))) == 50


def test_a_second_server_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite3"

    async def run() -> None:
        database = Database(path, [TABLE])
        await database.write(insert("one"))
        with pytest.raises(DanluError, match=rf"another danlu server uses it \(process {os.getpid()}\).*--data"):
            Database(path, [TABLE])
        assert texts(open_to_read(path)) == ["one"]
        await database.close()
        await Database(path, [TABLE]).close()

    asyncio.run(run())


def test_kill_lets_go_of_the_file_and_loses_nothing_committed(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from danlu.server.access.database import Database
async def run():
    database = Database(Path(sys.argv[1]), [{TABLE!r}])
    for number in range(10**9):
        await database.write(lambda c: c.execute("INSERT INTO notes (text) VALUES (?)", (str(number),)))
        print(number, flush=True)
asyncio.run(run())
"""
    path = tmp_path / "server.sqlite3"
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(30):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    told = 30 + sum(line.endswith("\n") for line in process.stdout)
    process.wait()
    process.stdout.close()

    async def run() -> list[str]:
        database = Database(path, [TABLE])
        found = await database.read(texts)
        assert await database.read(lambda c: c.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
        await database.close()
        return found

    found = asyncio.run(run())
    assert found == [str(number) for number in range(len(found))]
    assert len(found) >= told


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for open_it in (Database, open_to_read):
        with pytest.raises(DanluError, match=r"newer danlu.*99"):
            open_it(path)
    path.unlink()
    asyncio.run(Database(path).close())  # the refused one let go


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_told(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "server.sqlite3"
    path.write_bytes(damage)
    with pytest.raises(DanluError, match=r"server\.sqlite3: is damaged, or no database of danlu"):
        Database(path, [TABLE])
    assert path.read_bytes() == damage


def test_places_that_cannot_hold_it_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.sqlite3").mkdir()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DanluError, match=r"is a file, not a folder; choose another --data"):
            Database(folder / "server.sqlite3")
    with pytest.raises(DanluError, match=r"folder\.sqlite3: cannot be opened"):
        Database(tmp_path / "folder.sqlite3")
    with pytest.raises(DanluError, match=r"none\.sqlite3: does not exist; `danlu serve` makes it"):
        open_to_read(tmp_path / "none.sqlite3")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="root may write everywhere")
def test_a_folder_without_rights_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    program = (
        "import sys, pathlib\nfrom danlu.server.access.database import Database\nDatabase(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(folder / "server.sqlite3")]
    if os.geteuid() == 0:  # without the capability that lets root write where it may not
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "DanluError" in done.stderr
    assert "cannot be written (Permission denied)" in done.stderr


def test_a_full_disk_is_told_at_start_and_is_a_503_later(tmp_path: Path) -> None:
    """A database that may not grow fails like a full disk does (SQLITE_FULL)."""

    async def run() -> None:
        database = Database(tmp_path / "server.sqlite3", [TABLE])

        def fill(connection: sqlite3.Connection) -> None:
            connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
            insert("x" * 100_000)(connection)

        with pytest.raises(ApiError, match="database or disk is full") as error:
            await database.write(fill)
        assert error.value.status == 503
        assert await database.read(texts) == []
        await database.close()

    asyncio.run(run())


def test_a_disk_that_is_full_at_start_is_told(tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of the disk."""
    program = (
        "import pathlib, resource, sys\nfrom danlu.server.access.database import Database\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nDatabase(pathlib.Path(sys.argv[1]), [sys.argv[2]])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "server.sqlite3"), TABLE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "DanluError" in done.stderr
    assert "the disk may be full" in done.stderr


def test_a_mistake_of_ours_is_no_failure_of_the_database() -> None:
    async def run() -> None:
        database = Database(None)
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await database.read(lambda connection: connection.execute("SELECT * FROM missing"))
        await database.close()

    asyncio.run(run())
