"""Routes of the chat page's conversations, which belong to the key that made them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response, StreamingResponse

from danlu.server.access.database import Database
from danlu.server.access.keys import caller_of
from danlu.server.access.limits import ParsedRoute
from danlu.server.conversations import store as store
from danlu.server.conversations.schema import (
    ConversationFields,
    ConversationReply,
    Export,
    Id,
    ImportBody,
    Imported,
    MessageFields,
    Saved,
    SummaryList,
    WholeConversationReply,
)
from danlu.server.conversations.search import list_conversations
from danlu.server.conversations.text import from_markdown, shown_branch, to_markdown
from danlu.server.errors import ApiError, documented
from danlu.server.schema import JsonObject
from danlu.server.serving import serving_of

router = APIRouter(prefix="/api/conversations", tags=["conversations"], route_class=ParsedRoute)

ConversationId = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$", description="Of a conversation.")]
MessageId = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$", description="Of a message; a client may make it.")]
Before = Annotated[
    str | None,
    Query(
        pattern=r"^\d{1,12}(\.\d{1,9})?(_[0-9a-f-]{36})?$",
        max_length=64,
        description="Those before: `next` of the previous answer, or an `updated_at`.",
    ),
]
HEAD = b'{"format": "danlu-conversations", "version": 1, "conversations": ['
TAIL = b"]}\n"


@router.get("", response_model=SummaryList, responses=documented())
async def list_all(
    request: Request,
    q: Annotated[str, Query(max_length=200, description="Words to search for in titles and messages.")] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Before = None,
) -> JsonObject:
    """Conversations, newest first."""
    database, caller = _place(request)
    found, further = await database.read(lambda connection: list_conversations(connection, caller, q, limit, before))
    return {"data": found, "has_more": further is not None, "next": further}


@router.post("", response_model=ConversationReply, status_code=201, responses=documented(409))
async def create(request: Request, body: ConversationFields) -> JsonObject:
    """Begin a conversation."""
    if body.leaves:
        raise ApiError(400, "leaves: a new conversation has no messages", param="leaves", code="invalid_value")
    database, caller = _place(request)
    return await database.write(lambda connection: store.create(connection, caller, body.model_dump()))


@router.get("/export", response_model=Export, responses=documented())
async def export_all(request: Request) -> Response:
    """All conversations as a JSON file."""
    database, caller = _place(request)
    summaries, _ = await database.read(lambda connection: list_conversations(connection, caller))
    name = f"danlu-conversations-{time.strftime('%Y-%m-%d')}.json"
    return StreamingResponse(
        _exported(database, caller, [one["id"] for one in summaries]),
        media_type="application/json",
        headers=_as_file(name),
    )


@router.post("/import", response_model=Imported, status_code=201, responses=documented(409))
async def import_all(request: Request, body: ImportBody) -> JsonObject:
    """Add the conversations of an export under new ids: all of them, or none."""
    if body.text is not None:
        whole = [await asyncio.to_thread(from_markdown, body.text)]
    else:
        whole = [one.model_dump() for one in body.conversations or ()]
    database, caller = _place(request)
    added = await database.write(lambda connection: store.add_whole(connection, caller, whole))
    shown = ("id", "title", "models", "created_at", "updated_at")
    return {"data": [{name: one[name] for name in shown} for one in added]}


@router.get("/{id}", response_model=WholeConversationReply, responses=documented(404))
async def read(request: Request, id: ConversationId) -> Response:
    """A conversation with all its messages."""
    conversation, messages = await _whole(request, id)
    return Response(await asyncio.to_thread(_as_json, conversation, messages), media_type="application/json")


@router.patch("/{id}", response_model=ConversationReply, responses=documented(404))
async def change(request: Request, id: ConversationId, body: ConversationFields) -> JsonObject:
    """Change the fields that are given."""
    database, caller = _place(request)
    fields = body.model_dump(exclude_unset=True)
    return await database.write(lambda connection: store.change(connection, caller, id, fields))


@router.delete("/{id}", status_code=204, responses=documented(404))
async def delete(request: Request, id: ConversationId) -> None:
    """Delete a conversation."""
    database, caller = _place(request)
    await database.write(lambda connection: store.delete(connection, caller, id))


@router.put("/{id}/messages/{message_id}", response_model=Saved, responses=documented(404, 409))
async def save_message(request: Request, id: ConversationId, message_id: MessageId, body: MessageFields) -> JsonObject:
    """Add a message below its parent, or replace it: an answer may be saved again as it grows."""
    database, caller = _place(request)
    message = {"id": message_id, **body.model_dump()}
    return await database.write(lambda connection: store.save_message(connection, caller, id, message))


@router.delete("/{id}/messages/{message_id}", status_code=204, responses=documented(404))
async def delete_message(request: Request, id: ConversationId, message_id: MessageId) -> None:
    """Delete a message with all that hangs below it."""
    database, caller = _place(request)
    await database.write(lambda connection: store.delete_message(connection, caller, id, message_id))


@router.get(
    "/{id}/export",
    response_class=Response,
    responses={
        200: {
            "description": "A file.",
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/Export"}},
                "text/markdown": {"schema": {"type": "string"}},
            },
        },
        **documented(404),
    },
)
async def export(
    request: Request,
    id: ConversationId,
    format: Literal["json", "markdown"] = "json",
    leaf: Annotated[
        Id | None, Query(description="Markdown: the last message of the branch; the first that is shown by default.")
    ] = None,
) -> Response:
    """A conversation as a file: all of it as JSON, or what is shown of it as Markdown."""
    conversation, messages = await _whole(request, id)
    name = conversation["title"].strip() or "conversation"
    if format == "json":
        if leaf is not None:
            raise ApiError(400, "leaf: JSON holds all branches; leave it out", param="leaf", code="invalid_value")
        text = await asyncio.to_thread(_as_json, conversation, messages)
        return Response(HEAD + text + TAIL, media_type="application/json", headers=_as_file(f"{name}.json"))
    markdown = await asyncio.to_thread(lambda: to_markdown(conversation, shown_branch(conversation, messages, leaf)))
    return Response(markdown, media_type="text/markdown", headers=_as_file(f"{name}.md"))


def _place(request: Request) -> tuple[Database, str]:
    return serving_of(request).database, caller_of(request).id


async def _whole(request: Request, id: str) -> tuple[JsonObject, list[JsonObject]]:
    """A conversation and its messages."""
    database, caller = _place(request)
    return await database.read(lambda connection: _read(connection, caller, id))


def _read(connection: sqlite3.Connection, caller: str, id: str) -> tuple[JsonObject, list[JsonObject]]:
    number = store.number_of(connection, caller, id)
    return store.read(connection, number), list(store.messages(connection, number))


async def _exported(database: Database, caller: str, ids: list[str]) -> AsyncIterator[bytes]:
    """The file in pieces, a conversation each."""
    yield HEAD
    between = b""
    for id in ids:
        try:
            found = await database.read(lambda connection, id=id: _read(connection, caller, id))  # type: ignore[misc]
        except ApiError as error:
            if error.status == 404:  # it was deleted meanwhile
                continue
            raise
        yield between + await asyncio.to_thread(_as_json, *found)
        between = b",\n"
    yield TAIL


def _as_json(conversation: JsonObject, messages: list[JsonObject]) -> bytes:
    """A message at a time, so that other threads get their turn: the whole may have 64 MiB."""
    head = json.dumps(conversation, ensure_ascii=False).removesuffix("}")
    body = ",\n".join(json.dumps(message, ensure_ascii=False) for message in messages)
    return f'{head}, "messages": [{body}]}}'.encode()


def _as_file(name: str) -> dict[str, str]:
    """Headers of a file that is saved under a name (RFC 6266)."""
    safe = "".join("-" if letter in '/\\:*?"<>|%' or not letter.isprintable() else letter for letter in name)
    plain = safe.encode("ascii", "replace").decode().replace("?", "-")
    return {"Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(safe, safe='')}"}
