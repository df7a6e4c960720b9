"""Stored responses: chains, other keys, age and size."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from danlu.server.access.database import Database
from danlu.server.api import response_store
from danlu.server.api.response_items import input_items
from danlu.server.api.response_schema import CreateResponse
from danlu.server.api.response_store import TABLE, ResponseStore
from danlu.server.api.responses import new_response
from danlu.server.errors import ApiError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(tmp_path / "server.sqlite3", (TABLE,))
    yield database
    await database.close()


async def added(store: ResponseStore, text: str, answer: str, previous: str | None = None, caller: str = "a") -> str:
    """The id of a whole response."""
    response = new_response(CreateResponse(input=text, previous_response_id=previous), "tiny")
    await store.add(caller, response, input_items(text))
    part = {"type": "output_text", "text": answer, "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    await store.put(response | {"status": "completed", "output": [message]})
    return str(response["id"])


def texts(items: list[dict[str, Any]]) -> list[str]:
    return ["".join(part["text"] for part in item["content"]) for item in items]


async def test_a_conversation_is_what_was_said_in_order(database: Database) -> None:
    store = ResponseStore(database)
    first = await added(store, "one", "eins")
    second = await added(store, "two", "zwei", first)
    third = await added(store, "three", "drei", second)
    other = await added(store, "zwo", "deux", first)  # from the same one
    assert texts(await store.conversation("a", third)) == ["one", "eins", "two", "zwei", "three", "drei"]
    assert texts(await store.conversation("a", other)) == ["one", "eins", "zwo", "deux"]
    assert texts(await store.input("a", third)) == ["one", "eins", "two", "zwei", "three"]
    assert texts(await store.input("a", first)) == ["one"]


async def test_another_key_has_none_of_it(database: Database) -> None:
    store = ResponseStore(database)
    mine = await added(store, "secret", "yes")
    for ask in (store.get, store.input, store.delete):
        with pytest.raises(ApiError) as found:
            await ask("b", mine)
        assert found.value.status == 404
    with pytest.raises(ApiError) as found:
        await store.conversation("b", mine)
    assert (found.value.status, found.value.code) == (400, "previous_response_not_found")
    assert "secret" not in found.value.message
    assert (await store.get("a", mine)).response["id"] == mine


async def test_a_chain_whose_beginning_is_gone_is_refused(database: Database) -> None:
    store = ResponseStore(database)
    first = await added(store, "one", "eins")
    second = await added(store, "two", "zwei", first)
    await store.delete("a", first)
    with pytest.raises(ApiError, match=first):
        await store.conversation("a", second)
    assert (await store.get("a", second)).response["previous_response_id"] == first
    with pytest.raises(ApiError):
        await store.delete("a", first)


async def test_only_what_is_whole_can_be_gone_on_from(database: Database) -> None:
    store = ResponseStore(database)
    response = new_response(CreateResponse(input="hi"), "tiny")
    await store.add("a", response, input_items("hi"))
    with pytest.raises(ApiError, match="in_progress"):
        await store.conversation("a", response["id"])


async def test_events_come_back_as_they_were_sent(database: Database) -> None:
    store = ResponseStore(database)
    response = new_response(CreateResponse(input="hi"), "tiny")
    await store.add("a", response, input_items("hi"))
    events = [f'event: e\ndata: {{"n": {n}, "text": "\\n\\n丹"}}\n\n'.encode() for n in range(3)]
    await store.put(response, events)
    assert (await store.get("a", response["id"])).events == events
    await store.put(response, [])
    assert (await store.get("a", response["id"])).events == []


async def test_what_was_deleted_meanwhile_does_not_come_back(database: Database) -> None:
    store = ResponseStore(database)
    response = new_response(CreateResponse(input="hi"), "tiny")
    await store.add("a", response, input_items("hi"))
    await store.delete("a", response["id"])
    await store.put(response)
    with pytest.raises(ApiError):
        await store.get("a", response["id"])


async def test_the_oldest_go(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(database)
    others = await added(store, "one", "eins", caller="b")
    monkeypatch.setattr(response_store, "MOST_RESPONSES", 3)
    ids = [await added(store, str(n), "x") for n in range(5)]
    assert await kept(database, "a") == set(ids[2:])
    monkeypatch.setattr(response_store, "MOST_RESPONSES", 100)
    monkeypatch.setattr(response_store, "MOST_BYTES", 20_000)
    big = await added(store, "x" * 19_000, "x")
    assert await kept(database, "a") == {big}
    bigger = await added(store, "x" * 21_000, "x")  # the newest stays, whatever its size
    assert await kept(database, "a") == {bigger}
    assert await kept(database, "b") == {others}


async def test_what_is_older_than_thirty_days_is_gone(database: Database) -> None:
    store = ResponseStore(database)
    old, new = await added(store, "old", "x"), await added(store, "new", "x")
    then = time.time() - 30 * 86400 - 1
    await database.write(lambda c: c.execute("UPDATE responses SET created = ? WHERE id = ?", (then, old)))
    with pytest.raises(ApiError):
        await store.get("a", old)
    assert (await store.get("a", new)).response["id"] == new
    await added(store, "newer", "x", caller="b")
    assert await kept(database, "a") == {new}


async def kept(database: Database, caller: str) -> set[str]:
    def ids(connection: sqlite3.Connection) -> set[str]:
        return {row[0] for row in connection.execute("SELECT id FROM responses WHERE caller = ?", (caller,))}

    return await database.read(ids)
