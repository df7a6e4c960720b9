"""A small application behind the server's real middlewares, keys and database, without models."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, StreamingResponse

from danlu.server.access import login, usage
from danlu.server.access.auth import Auth
from danlu.server.access.database import Database
from danlu.server.access.headers import SecurityHeaders, cors
from danlu.server.access.key_file import Limits as KeyLimits
from danlu.server.access.key_file import add_key
from danlu.server.access.keys import Keys, caller_of
from danlu.server.access.limits import Limits, ParsedRoute
from danlu.server.access.sessions import TABLE, Sessions
from danlu.server.access.usage import Usage
from danlu.server.errors import ApiError, answer_error
from danlu.server.schema import Body

router = APIRouter(route_class=ParsedRoute)


class Echoed(Body):
    """Any JSON."""

    value: Any = None


@router.get("/v1/who")
@router.post("/v1/who")
async def who(request: Request) -> str:
    return caller_of(request).name


@router.post("/v1/echo")
@router.post("/v1/messages")
async def echo(body: Echoed) -> Any:
    return body.value


@router.post("/v1/parsed-once")
async def parsed_once(body: Echoed, request: Request) -> bool:
    return body.value is request.scope["danlu.json"]["value"]


@router.get("/health/live")
async def live() -> str:
    return "live"


@router.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>the page</title><h1>the page</h1>")


@router.get("/v1/stream")
async def stream() -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        for number in range(20):
            yield f"{number}\n"
            await asyncio.sleep(0.02)

    return StreamingResponse(parts())


def guarded(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    cors_origin: tuple[str, ...] = (),
    max_body: int = 1 << 20,
    seconds: float = 5.0,
) -> FastAPI:
    """The application; its keys are in ``folder/keys.json``, if there."""
    database = Database(folder / "server.sqlite3", (usage.TABLE, TABLE))
    used = Usage(database)
    keys, sessions = Keys(folder / "keys.json", used), Sessions(database)
    app = FastAPI(
        exception_handlers=dict.fromkeys((ApiError, RequestValidationError, HTTPException), answer_error),
        middleware=[
            Middleware(SecurityHeaders),
            *cors(cors_origin),
            Middleware(Auth, keys=keys, sessions=sessions, host=host, cors_origin=cors_origin),
            Middleware(Limits, max_body=max_body, seconds=seconds),
        ],
    )
    app.state.serving = SimpleNamespace(database=database, usage=used, keys=keys, sessions=sessions)
    for one in (router, usage.router, login.router):
        app.include_router(one)
    return app


@contextlib.asynccontextmanager
async def opened(app: FastAPI, base_url: str = "http://127.0.0.1:8000") -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process; the database is closed with the block."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base_url) as client:
        try:
            yield client
        finally:
            await app.state.serving.database.close()


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[tuple[str, int]]:
    """The application behind uvicorn on a free port: (host, port)."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        asyncio.run(app.state.serving.database.close())


def make_key(folder: Path, name: str = "alice", **limits: int) -> str:
    """A new key's secret."""
    return add_key(folder / "keys.json", name, limits=KeyLimits(**limits))[1]


def bearer(secret: str) -> dict[str, str]:
    """The header of OpenAI's clients."""
    return {"Authorization": f"Bearer {secret}"}
