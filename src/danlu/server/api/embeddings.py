"""POST /v1/embeddings: texts to vectors."""

from __future__ import annotations

import array
import asyncio
import base64
import json
import sys
from typing import Any, Final, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from danlu.server.access.limits import ParsedRoute
from danlu.server.api.inputs import Inputs, ModelName, Truncate, as_list, is_single
from danlu.server.errors import documented
from danlu.server.schema import Body, Reply
from danlu.server.serving import serving_of
from danlu.server.streaming import until_disconnect

router = APIRouter(route_class=ParsedRoute)

VECTORS_AT_ONCE: Final = 64
"""Written as numbers before others get their turn: some 10 ms of work."""


class EmbeddingRequest(Body):
    """Texts to embed."""

    input: Inputs = Field(description="A text, a list of texts, token ids, or a list of lists of token ids.")
    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of 32-bit floats, the lowest byte first. Default: float."
    )
    dimensions: int | None = Field(
        None, ge=1, le=1 << 20, description="Keep so many of the first numbers, and bring what is left to length 1."
    )
    user: str | None = Field(None, max_length=512, description="Accepted, and of no effect.")
    truncate_prompt_tokens: Truncate | None = Field(
        None,
        description="So many tokens of each text are read, special tokens included; -1: as many as the model can. "
        "None: longer texts are refused. Not in OpenAI's API.",
    )


class Embedding(Reply):
    """The vector of a text, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Reply):
    """A vector for each text, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=documented(404, 504))
async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Turn texts into vectors."""
    serving = serving_of(request)
    embedding = serving.embed(
        request,
        body.model,
        as_list(body.input),
        dimensions=body.dimensions,
        truncate=body.truncate_prompt_tokens,
        names={"input.0": "input"} if is_single(body.input) else {},
    )
    found = await until_disconnect(request, embedding)
    data = []
    for index, vector in enumerate(found.vectors):
        shown: Any = base64.b64encode(vector).decode() if body.encoding_format == "base64" else numbers(vector)
        data.append(json.dumps({"object": "embedding", "index": index, "embedding": shown}, separators=(",", ":")))
        if index % VECTORS_AT_ONCE == VECTORS_AT_ONCE - 1:
            await asyncio.sleep(0)
    usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    head = json.dumps({"object": "list", "model": found.model, "usage": usage}, separators=(",", ":"))
    return Response(f'{head[:-1]},"data":[{",".join(data)}]}}', media_type="application/json")


def numbers(vector: bytes) -> list[float]:
    """A vector as it is sent between processes: 32-bit floats, the lowest byte first."""
    found = array.array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()
