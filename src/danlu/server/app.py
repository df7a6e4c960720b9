"""The application: routes, what wraps them, and what lives as long as they do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from danlu import __version__
from danlu.errors import DanluError
from danlu.server import page
from danlu.server.access import login, sessions, usage
from danlu.server.access.auth import Auth
from danlu.server.access.data_folder import database_path, key_file_path
from danlu.server.access.database import Database
from danlu.server.access.headers import SecurityHeaders, cors
from danlu.server.access.keys import Keys
from danlu.server.access.limits import Limits
from danlu.server.api import (
    chat_completions,
    completions,
    embeddings,
    messages,
    model_list,
    rerank,
    response_store,
    responses,
    tokens,
)
from danlu.server.api.response_jobs import Jobs
from danlu.server.config import ServeConfig, named_adapters, named_models
from danlu.server.conversations import routes as conversations
from danlu.server.conversations import store as conversation_store
from danlu.server.errors import ApiError, answer_error
from danlu.server.models import Models
from danlu.server.operation import health, metrics
from danlu.server.operation.drain import Gate
from danlu.server.operation.logs import RequestLog
from danlu.server.operation.metrics import Metrics
from danlu.server.serving import Serving

if TYPE_CHECKING:
    from danlu.server.operation.tracing import Tracing

ROUTES = (
    chat_completions, completions, responses, messages, embeddings, rerank, tokens, model_list,
    conversations, usage, login, health, metrics,
)  # fmt: skip
TABLES = (usage.TABLE, sessions.TABLE, conversation_store.TABLES, response_store.TABLE)


class Application(FastAPI):
    """FastAPI documents a 422 for whatever it validates; here that is a 400 (see errors.py)."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            for path in super().openapi()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(
    config: ServeConfig,
    *,
    tracing: Tracing | None = None,
    failed: Callable[[DanluError], None] | None = None,
) -> FastAPI:
    """The whole server as an ASGI application. Its lifespan loads the first model and ends all models' processes.

    Args:
        failed: called when the first model cannot be loaded; without it, those who ask for the model are told.

    Raises:
        DanluError: the database or the key file cannot be used.
    """
    database = Database(database_path(config.data), TABLES)
    must_exist = config.api_key_file is not None
    keys = Keys(key_file_path(config.api_key_file, config.data), usage.Usage(database), must_exist=must_exist)
    measured = Metrics((*named_models(config.model), *(adapter.name for adapter in named_adapters(config))))
    models = Models(config, measured)
    serving = Serving(config, models, database, keys, measured)

    async def preload() -> None:
        try:
            await models.preload()
        except (DanluError, ApiError) as error:
            if failed is not None:
                failed(error if isinstance(error, DanluError) else DanluError(error.message))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(preload())
        # Now, and in a thread: it takes seconds, in which nobody would be answered.
        documenting = asyncio.create_task(asyncio.to_thread(app.openapi))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, documenting, return_exceptions=True)
            await models.close()
            await app.state.response_jobs.close()
            await database.close()

    app = Application(
        title="danlu",
        version=__version__,
        summary="Language models behind the APIs of OpenAI and Anthropic.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys((ApiError, DanluError, RequestValidationError, HTTPException), answer_error),
        middleware=[
            Middleware(RequestLog, metrics=measured, log_prompts=config.log_prompts, tracing=tracing),
            Middleware(SecurityHeaders),
            *cors(config.cors_origin),
            Middleware(Gate),
            Middleware(Auth, keys=keys, sessions=serving.sessions, host=config.host, cors_origin=config.cors_origin),
            Middleware(Limits, max_body=config.max_body << 20, seconds=config.header_timeout),
        ],
    )
    app.state.serving, app.state.metrics, app.state.response_jobs = serving, measured, Jobs()
    for module in (*ROUTES, page) if config.page else ROUTES:
        app.include_router(module.router)
    return app
