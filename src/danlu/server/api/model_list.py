"""GET /v1/models: which models there are."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from danlu.server.access.keys import caller_of
from danlu.server.errors import documented
from danlu.server.models import Entry, State
from danlu.server.protocol import Kind
from danlu.server.schema import Reply
from danlu.server.serving import serving_of

router = APIRouter()


class ModelFacts(Reply):
    """What this server tells beyond OpenAI's fields; most of it is known of a loaded model only."""

    state: State
    loaded: bool
    memory: int = Field(description="Bytes that its process holds; an adapter's is its model's.")
    kind: Kind | None = Field(
        None, description="generate: writes texts; embed: turns them into vectors; rank: compares pairs of them."
    )
    context: int | None = Field(None, description="Tokens that prompt and answer can have together.")
    vocab_size: int | None = None
    dim: int | None = Field(None, description="Numbers of an embedding.")
    chat: bool | None = Field(None, description="It has a chat template.")
    thinks: bool | None = Field(None, description="Its chat template knows about reasoning.")
    tools: bool | None = Field(None, description="Its chat template writes tools itself.")
    fills_middle: bool | None = Field(None, description="It takes a suffix.")
    kernels: str | None = Field(None, description="What computes it.")


class Model(Reply):
    """A model that can be named in requests."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="Its own name; of an adapter, that of its model.")
    parent: str | None = Field(None, description="Of an adapter: its model.")
    danlu: ModelFacts


class ModelList(Reply):
    """The models that the key may use; the first is taken where a request names none."""

    object: Literal["list"]
    data: list[Model]


@router.get("/v1/models", responses=documented())
async def list_models(request: Request) -> ModelList:
    """List the models."""
    caller, entries = caller_of(request), serving_of(request).models.entries.values()
    return ModelList(object="list", data=[_model(entry) for entry in entries if caller.may_use(entry.name)])


@router.get("/v1/models/{model:path}", responses=documented(404))
async def retrieve_model(request: Request, model: str) -> Model:
    """Tell of one model; its name may hold slashes."""
    return _model(serving_of(request).entry(request, model))


def _model(entry: Entry) -> Model:
    state = entry.state
    facts: dict[str, Any] = {"state": state, "loaded": state == "loaded", "memory": entry.owner.memory}
    if (info := entry.info) is not None:
        same = ("kind", "context", "vocab_size", "dim", "chat", "thinks", "fills_middle")
        facts |= {name: getattr(info, name) for name in same}
        facts |= {"tools": info.template_has_tools, "kernels": info.kernels or None}
    return Model(
        id=entry.name,
        object="model",
        created=entry.created,
        owned_by="danlu",
        root=entry.owner.name,
        parent=None if entry.parent is None else entry.parent.name,
        danlu=ModelFacts(**facts),
    )
