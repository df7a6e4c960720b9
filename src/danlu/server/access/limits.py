"""What a request's body may be, before anything works on it: its size, its pace, and JSON that means something."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.server.errors import ApiError, answer_error

MAX_QUERY = 8 << 10
"""Bytes of a query string."""

MAX_DEPTH = 64
"""Objects and lists within each other."""

MAX_CONTAINERS = 250_000
"""Objects and lists altogether: each costs the server some hundred bytes and a quarter of a microsecond."""

SLOWEST = 64 << 10
"""Bytes a second that a body may take longer than the time that every request has (a large body on a slow line)."""

DISCARDED_BODIES, DISCARDING_SECONDS = 4, 1.0
"""How much more than a body a client may send, and for how long, after which it learns that it was too large."""

FORMS = frozenset({"/login"})
"""Paths that take a form as well as JSON."""

# In proportion to the body, whatever is in it: what begins in the middle of a run of backslashes is given up at once.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")


class Limits:
    """ASGI middleware that reads the body whole and checks it.

    Args:
        max_body: bytes of a body.
        seconds: time in which it has to be there, besides what :data:`SLOWEST` gives.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, seconds: float) -> None:
        self.app, self.max_body, self.seconds = app, max_body, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if len(scope["query_string"]) > MAX_QUERY:
                raise ApiError(400, f"the query is longer than {MAX_QUERY} bytes; send less", code="query_too_long")
            if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
                await self.app(scope, receive, send)
                return
            is_json = _is_json(headers, scope["path"])
            body = await self._body(headers, receive)
            if body is None:
                return  # the client is gone
            if body and is_json:
                scope["danlu.json"] = parse(body)
        except ApiError as error:
            await (await answer_error(Request(scope), error))(scope, receive, send)
            return
        await self.app(scope, _again(body, receive), send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away before."""
        if (told := headers.get("content-length", "")).isdecimal() and int(told) > self.max_body:
            if headers.get("expect", "").lower() != "100-continue":  # then it waits to be asked for the body
                await self._discard(receive)
            raise self._too_large()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.seconds) as limit:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > self.max_body:
                        break
                    if not message.get("more_body", False):
                        return b"".join(chunks)
                    limit.reschedule(begun + self.seconds + size / SLOWEST)
        except TimeoutError:
            raise ApiError(408, "the body of the request came too slowly", code="request_timeout") from None
        chunks.clear()
        await self._discard(receive)
        raise self._too_large()

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: a client that still sends when the connection is closed does not see the answer."""
        size, most = 0, DISCARDED_BODIES * self.max_body
        try:
            async with asyncio.timeout(DISCARDING_SECONDS):
                while size < most:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    size += len(message.get("body", b""))
        except TimeoutError:
            return

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.max_body >> 20} MiB; send less, or serve with a larger --max-body",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: 400; it is no JSON object, or one that no part of the server should have to deal with: nested too
            deep, of too many parts, with NUL characters, lone surrogates, or numbers that are none.
    """
    if b"\\u0000" in body and _NUL.search(body):
        raise _invalid("a text holds the character U+0000; leave it out")
    if _containers(body) > MAX_CONTAINERS and _containers(_outside_strings(body)) > MAX_CONTAINERS:
        raise _invalid(f"it has more than {MAX_CONTAINERS:,} objects and lists; send fewer")
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _invalid(str(error)) from None
    if not isinstance(parsed, dict):
        raise _invalid("it must be an object, {...}")
    _walk(parsed)
    return parsed


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _outside_strings(body: bytes) -> bytes:
    """A body without its strings. (Where it is no JSON, up to the place where it stops being JSON.)"""
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def _walk(parsed: dict[str, Any]) -> None:
    """Level by level, in loops of the interpreter's own: there can be millions of values."""
    level: list[Any] = [parsed]
    for _ in range(MAX_DEPTH):
        values = list(chain.from_iterable(one.values() if type(one) is dict else one for one in level))
        types = set(map(type, values))
        if float in types and (math.inf in values or -math.inf in values):
            raise _invalid("a number is too large")  # 1e999, which floating point takes for infinite
        if dict not in types and list not in types:
            return
        level = [value for value in values if type(value) is dict or type(value) is list]
    raise _invalid(f"it is nested more than {MAX_DEPTH} deep")


def _invalid(why: str) -> ApiError:
    return ApiError(400, f"the body is not JSON that this server takes: {why}", code="invalid_json")


def _is_json(headers: Headers, path: str) -> bool:
    """Whether the body is JSON.

    Raises:
        ApiError: 415; it is of another kind, or compressed.
    """
    if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"the body is compressed ({encoding[:40]}); send it as it is", code="unsupported_encoding")
    media_type, _, rest = headers.get("content-type", "").lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]*)", rest)
    if charset and charset[1] not in ("utf-8", "utf8"):
        raise ApiError(415, f"the body is in {charset[1][:40]!r}; send UTF-8", code="unsupported_charset")
    if media_type.strip() == "application/json":
        return True
    if path in FORMS and media_type.strip() == "application/x-www-form-urlencoded":
        return False
    raise ApiError(
        415,
        f"the body is of type {media_type.strip()[:80]!r}; send JSON, with the header Content-Type: application/json",
        code="unsupported_media_type",
    )


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives a body which was read already, then what else comes (that the client is gone)."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


class ParsedRequest(Request):
    """A request whose JSON was parsed by :class:`Limits` already."""

    async def json(self) -> Any:
        """The body."""
        return self.scope["danlu.json"] if "danlu.json" in self.scope else await super().json()


class ParsedRoute(APIRoute):
    """``route_class`` of routers with bodies, so that FastAPI does not parse them again."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, given a :class:`ParsedRequest`."""
        handle = super().get_route_handler()

        async def handle_parsed(request: Request) -> Response:
            return await handle(ParsedRequest(request.scope, request.receive))

        return handle_parsed
