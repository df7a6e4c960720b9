"""Whether the server lives and whether it can answer, for whoever watches it: no keys, no locks, no work.

A server that lives but is not ready (it loads its first model, or is about to end) should get no requests, and should
not be restarted.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from danlu.server.schema import Reply

ALIVE = b'{"status":"alive"}'
NO_STORE = {"cache-control": "no-store"}


class Liveness(Reply):
    """The process serves."""

    status: Literal["alive"]


class Readiness(Reply):
    """Whether requests are answered, and how many models are loaded of those that are served."""

    status: Literal["ready", "loading", "draining"]
    models: int
    loaded: int


router = APIRouter(tags=["operation"])


async def live() -> Response:
    """Whether the process serves."""
    return Response(ALIVE, media_type="application/json", headers=NO_STORE)


async def ready(request: Request) -> Response:
    """Whether requests are answered now: 503 until the first model is loaded, and again once the server is ending."""
    state = request.app.state
    entries = state.serving.models.entries.values()
    loaded = sum(entry.state == "loaded" for entry in entries)
    # Once ready, ready for good: a model that was unloaded or has crashed is loaded by the request that asks for it.
    state.been_ready = getattr(state, "been_ready", False) or loaded > 0
    status = "draining" if getattr(state, "draining", False) else "ready" if state.been_ready else "loading"
    body = {"status": status, "models": len(entries), "loaded": loaded}
    return JSONResponse(body, status_code=200 if status == "ready" else 503, headers=NO_STORE)


NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Not yet, or no longer."}}

router.get("/health/live", response_model=Liveness)(live)
router.head("/health/live", include_in_schema=False)(live)
for path in ("/health/ready", "/health"):
    router.get(path, response_model=Readiness, responses=NOT_READY)(ready)
    router.head(path, include_in_schema=False)(ready)
