"""Conversations of the chat page in SQLite: a tree of messages each, which belongs to one key.

The functions run in the database's thread (`Database.read`, `Database.write`) and take its connection. A message's
parent is there before it and is never changed, which is why there can be no cycle.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from danlu.server.errors import ApiError
from danlu.server.schema import JsonObject

CONVERSATIONS = 10_000
"""Of a key."""

MESSAGES = 10_000
"""Of a conversation."""

CONVERSATION_BYTES = 64 << 20
"""Of a conversation's messages: it is read and exported whole."""

TABLES = """
CREATE TABLE IF NOT EXISTS conversations (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    caller TEXT NOT NULL,
    title TEXT NOT NULL,
    system TEXT NOT NULL,
    parameters TEXT NOT NULL,
    models TEXT NOT NULL,
    leaves TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS conversations_of_caller ON conversations (caller, updated_at, id);

CREATE TABLE IF NOT EXISTS conversation_messages (
    number INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations (number) ON DELETE CASCADE,
    id TEXT NOT NULL,
    parent TEXT,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    reasoning TEXT,
    reasoning_seconds REAL,
    tool_calls TEXT,
    model TEXT,
    finish_reason TEXT,
    stats TEXT,
    logprobs TEXT,
    created_at REAL NOT NULL,
    bytes INTEGER NOT NULL,
    UNIQUE (conversation, id)
);
CREATE INDEX IF NOT EXISTS conversation_messages_below ON conversation_messages (conversation, parent, id, bytes);

CREATE VIRTUAL TABLE IF NOT EXISTS conversation_titles
    USING fts5(title, content='conversations', content_rowid='number', tokenize='trigram');
CREATE TRIGGER IF NOT EXISTS conversation_title_added AFTER INSERT ON conversations BEGIN
    INSERT INTO conversation_titles (rowid, title) VALUES (new.number, new.title);
END;
CREATE TRIGGER IF NOT EXISTS conversation_title_removed AFTER DELETE ON conversations BEGIN
    INSERT INTO conversation_titles (conversation_titles, rowid, title) VALUES ('delete', old.number, old.title);
END;
CREATE TRIGGER IF NOT EXISTS conversation_title_changed AFTER UPDATE OF title ON conversations BEGIN
    INSERT INTO conversation_titles (conversation_titles, rowid, title) VALUES ('delete', old.number, old.title);
    INSERT INTO conversation_titles (rowid, title) VALUES (new.number, new.title);
END;

CREATE VIRTUAL TABLE IF NOT EXISTS conversation_texts
    USING fts5(content, content='conversation_messages', content_rowid='number', tokenize='trigram');
CREATE TRIGGER IF NOT EXISTS conversation_text_added AFTER INSERT ON conversation_messages BEGIN
    INSERT INTO conversation_texts (rowid, content) VALUES (new.number, new.content);
END;
CREATE TRIGGER IF NOT EXISTS conversation_text_removed AFTER DELETE ON conversation_messages BEGIN
    INSERT INTO conversation_texts (conversation_texts, rowid, content) VALUES ('delete', old.number, old.content);
END;
CREATE TRIGGER IF NOT EXISTS conversation_text_changed AFTER UPDATE OF content ON conversation_messages
    WHEN new.content IS NOT old.content BEGIN
    INSERT INTO conversation_texts (conversation_texts, rowid, content) VALUES ('delete', old.number, old.content);
    INSERT INTO conversation_texts (rowid, content) VALUES (new.number, new.content);
END;
"""

FIELDS = ("id", "title", "system", "parameters", "models", "leaves", "created_at", "updated_at")
MESSAGE_FIELDS = (
    "id", "parent", "role", "content", "reasoning", "reasoning_seconds", "tool_calls", "model", "finish_reason",
    "stats", "logprobs", "created_at",
)  # fmt: skip
AS_JSON = ("parameters", "models", "leaves", "tool_calls", "stats", "logprobs")
"""Fields that a column holds as JSON."""


def create(connection: sqlite3.Connection, caller: str, fields: JsonObject) -> JsonObject:
    """A new conversation without messages.

    Args:
        fields: title, system, parameters, models and leaves; also its times, if it had some.

    Raises:
        ApiError: the key has as many as it may.
    """
    _require_places(connection, caller, 1)
    return _insert(connection, caller, fields)


def number_of(connection: sqlite3.Connection, caller: str, id: str) -> int:
    """Where a conversation is kept.

    Raises:
        ApiError: the key has none of that id.
    """
    row = connection.execute("SELECT number FROM conversations WHERE id = ? AND caller = ?", (id, caller)).fetchone()
    if row is None:
        raise ApiError(404, f"there is no conversation {id}", code="conversation_not_found")
    number: int = row[0]
    return number


def read(connection: sqlite3.Connection, number: int) -> JsonObject:
    """A conversation without its messages."""
    row = connection.execute(f"SELECT {', '.join(FIELDS)} FROM conversations WHERE number = ?", (number,)).fetchone()
    return _unpacked(FIELDS, row)


def messages(connection: sqlite3.Connection, number: int) -> Iterator[JsonObject]:
    """A conversation's messages, each after its parent."""
    rows = connection.execute(
        f"SELECT {', '.join(MESSAGE_FIELDS)} FROM conversation_messages WHERE conversation = ? ORDER BY number",
        (number,),
    )
    return (_unpacked(MESSAGE_FIELDS, row) for row in rows)


def change(connection: sqlite3.Connection, caller: str, id: str, fields: JsonObject) -> JsonObject:
    """Set some fields of a conversation, and read it.

    Raises:
        ApiError: there is no such conversation, or it has no message that `leaves` names.
    """
    number = number_of(connection, caller, id)
    for leaf in fields.get("leaves", ()):
        if not _has_message(connection, number, leaf):
            raise _wrong("leaves", f"the conversation has no message {leaf}")
    for name, value in fields.items():
        connection.execute(f"UPDATE conversations SET {name} = ? WHERE number = ?", (_packed(name, value), number))
    return read(connection, number)


def delete(connection: sqlite3.Connection, caller: str, id: str) -> None:
    """Delete a conversation with its messages.

    Raises:
        ApiError: there is no such conversation.
    """
    connection.execute("DELETE FROM conversations WHERE number = ?", (number_of(connection, caller, id),))


def save_message(connection: sqlite3.Connection, caller: str, id: str, message: JsonObject) -> JsonObject:
    """Add a message, or replace the one of that id where it is. Returns its id and the times.

    Raises:
        ApiError: there is no such conversation or parent, the message hangs elsewhere, or the conversation is full.
    """
    number, now = number_of(connection, caller, id), time.time()
    old = connection.execute(
        "SELECT parent, created_at FROM conversation_messages WHERE conversation = ? AND id = ?",
        (number, message["id"]),
    ).fetchone()
    parent = message["parent"]
    if old is not None and old[0] != parent:
        raise _wrong("parent", f"the message hangs below {old[0]}; give it another id to have it elsewhere")
    if old is None and parent is not None and not _has_message(connection, number, parent):
        raise _wrong("parent", f"the conversation has no message {parent}")
    if message["created_at"] is None:
        message = {**message, "created_at": now if old is None else old[1]}
    _write_message(connection, number, message)
    _require_room(connection, number)
    connection.execute("UPDATE conversations SET updated_at = ? WHERE number = ?", (now, number))
    return {"id": message["id"], "created_at": message["created_at"], "updated_at": now}


def delete_message(connection: sqlite3.Connection, caller: str, id: str, message_id: str) -> None:
    """Delete a message with all that hangs below it. A leaf among them gives way to the message before.

    Raises:
        ApiError: there is no such conversation or message.
    """
    number = number_of(connection, caller, id)
    row = connection.execute(
        "SELECT parent FROM conversation_messages WHERE conversation = ? AND id = ?", (number, message_id)
    ).fetchone()
    if row is None:
        raise ApiError(404, f"the conversation has no message {message_id}", code="message_not_found")
    below = connection.execute(
        "WITH RECURSIVE below (id) AS (VALUES (:id) UNION SELECT m.id FROM conversation_messages m "
        "JOIN below ON m.parent = below.id WHERE m.conversation = :number) SELECT id FROM below",
        {"id": message_id, "number": number},
    ).fetchall()
    connection.executemany(
        "DELETE FROM conversation_messages WHERE conversation = ? AND id = ?", [(number, one) for (one,) in below]
    )
    gone, leaves = {one for (one,) in below}, read(connection, number)["leaves"]
    kept = [row[0] if leaf in gone else leaf for leaf in leaves]
    connection.execute(
        "UPDATE conversations SET leaves = ?, updated_at = ? WHERE number = ?",
        (_packed("leaves", [leaf for leaf in kept if leaf is not None]), time.time(), number),
    )


def add_whole(connection: sqlite3.Connection, caller: str, conversations: Sequence[JsonObject]) -> list[JsonObject]:
    """Add conversations with their messages under new ids, as an import does, and return them without messages.

    Raises:
        ApiError: there are too many, or one is too large; two messages have one id, one comes before its parent, or a
            leaf is none of them.
    """
    _require_places(connection, caller, len(conversations))
    return [_add_whole(connection, caller, conversation) for conversation in conversations]


def _add_whole(connection: sqlite3.Connection, caller: str, conversation: JsonObject) -> JsonObject:
    known: set[str] = set()
    for message in conversation["messages"]:
        id, parent = message["id"], message["parent"]
        if id in known:
            raise _wrong("messages", f"two have the id {id}")
        if parent is not None and parent not in known:
            raise _wrong("messages", f"{id} has the parent {parent}, which does not come before it")
        known.add(id)
    if lost := set(conversation["leaves"]) - known:
        raise _wrong("leaves", f"the conversation has no message {min(lost)}")
    created = _insert(connection, caller, conversation)
    number = number_of(connection, caller, created["id"])
    for message in conversation["messages"]:
        at = created["created_at"] if message["created_at"] is None else message["created_at"]
        _write_message(connection, number, {**message, "created_at": at})
    _require_room(connection, number)
    return created


def _insert(connection: sqlite3.Connection, caller: str, fields: JsonObject) -> JsonObject:
    now = time.time()
    conversation = {
        **fields,
        "id": str(uuid.uuid4()),
        "created_at": now if fields.get("created_at") is None else fields["created_at"],
        "updated_at": now if fields.get("updated_at") is None else fields["updated_at"],
    }
    columns = ", ".join(("caller", *FIELDS))
    values = [caller, *(_packed(name, conversation[name]) for name in FIELDS)]
    connection.execute(f"INSERT INTO conversations ({columns}) VALUES ({_marks(values)})", values)
    return {name: conversation[name] for name in FIELDS}


def _require_places(connection: sqlite3.Connection, caller: str, more: int) -> None:
    (count,) = connection.execute("SELECT count(*) FROM conversations WHERE caller = ?", (caller,)).fetchone()
    if count + more > CONVERSATIONS:
        raise ApiError(409, f"there are {count} conversations, and no more than {CONVERSATIONS} are kept; delete some",
                       code="too_many_conversations")  # fmt: skip


def _write_message(connection: sqlite3.Connection, number: int, message: JsonObject) -> None:
    values = [_packed(name, message[name]) for name in MESSAGE_FIELDS]
    size = sum(len(value.encode()) for value in values if isinstance(value, str))
    columns = ("conversation", *MESSAGE_FIELDS, "bytes")
    changed = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in ("conversation", "id"))
    connection.execute(
        f"INSERT INTO conversation_messages ({', '.join(columns)}) VALUES ({_marks(columns)}) "
        f"ON CONFLICT (conversation, id) DO UPDATE SET {changed}",
        (number, *values, size),
    )


def _require_room(connection: sqlite3.Connection, number: int) -> None:
    """Refuse what made a conversation too large; the transaction is then rolled back."""
    count, size = connection.execute(
        "SELECT count(*), total(bytes) FROM conversation_messages WHERE conversation = ?", (number,)
    ).fetchone()
    if count > MESSAGES:
        raise ApiError(409, f"a conversation has at most {MESSAGES} messages; begin another", code="too_many_messages")
    if size > CONVERSATION_BYTES:
        raise ApiError(409, f"a conversation has at most {CONVERSATION_BYTES >> 20} MiB; begin another",
                       code="conversation_too_large")  # fmt: skip


def _wrong(field: str, what: str) -> ApiError:
    return ApiError(400, f"{field}: {what}", param=field, code="invalid_value")


def _has_message(connection: sqlite3.Connection, number: int, id: str) -> bool:
    return (
        connection.execute(
            "SELECT 1 FROM conversation_messages WHERE conversation = ? AND id = ?", (number, id)
        ).fetchone()
        is not None
    )


def _marks(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)


def _packed(name: str, value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if name in AS_JSON and value is not None else value


def _unpacked(names: tuple[str, ...], row: tuple[Any, ...]) -> JsonObject:
    return {
        name: json.loads(value) if name in AS_JSON and value is not None else value
        for name, value in zip(names, row, strict=True)
    }
