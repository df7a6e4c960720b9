"""POST /v1/score and /v1/rerank: how well texts go together."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.server.access.limits import ParsedRoute
from danlu.server.api.inputs import MOST_INPUTS, ModelName, Truncate
from danlu.server.errors import ApiError, documented
from danlu.server.schema import Body, Reply, Text
from danlu.server.serving import serving_of
from danlu.server.streaming import until_disconnect

router = APIRouter(route_class=ParsedRoute)

Texts = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True), Tag("list[str]")],
    Discriminator(lambda value: "list[str]" if isinstance(value, list) else "str"),
]
TRUNCATE = (
    "So many tokens of each text (a cross-encoder: of each pair) are read, special tokens included; -1: as many as the "
    "model can. None: longer ones are refused."
)


class ScoreRequest(Body):
    """Pairs of texts: each of one list with its counterpart, or one text with each of a list."""

    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    text_1: Texts = Field(description="A text, or a list of texts.")
    text_2: Texts = Field(description="A text, or a list of as many texts as text_1 has; more if that is one.")
    truncate_prompt_tokens: Truncate | None = Field(None, description=TRUNCATE)
    user: str | None = Field(None, max_length=512, description="Accepted, and of no effect.")


class Score(Reply):
    """How well the texts of a pair go together, the higher the better."""

    object: Literal["score"]
    index: int
    score: float


class TokenUsage(Reply):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class ScoreList(Reply):
    """A score for each pair, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: TokenUsage


class Document(Body):
    """A text to rank."""

    text: Text


Documents = Annotated[
    list[
        Annotated[
            Annotated[Text, Tag("str")] | Annotated[Document, Tag("Document")],
            Discriminator(lambda value: "str" if isinstance(value, str) else "Document"),
        ]
    ],
    Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True),
]


class RerankRequest(Body):
    """Texts to bring into the order in which they answer a query."""

    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    query: Text
    documents: Documents = Field(description="Texts, or objects with a text.")
    top_n: int | None = Field(None, ge=1, le=1 << 20, description="Tell the best only; None: all.")
    return_documents: bool | None = Field(None, description="Give the texts back too. Default: false.")
    truncate_prompt_tokens: Truncate | None = Field(None, description=TRUNCATE)
    user: str | None = Field(None, max_length=512, description="Accepted, and of no effect.")


class GivenBack(Reply):
    """A document's text."""

    text: str


class Ranked(Reply):
    """A document by its place in the request, and how well it goes with the query."""

    index: int
    relevance_score: float
    document: GivenBack | None = None


class Ranking(Reply):
    """Documents, the best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: TokenUsage


@router.post("/v1/score", response_model=ScoreList, responses=documented(404, 504))
async def create_scores(request: Request, body: ScoreRequest) -> Response:
    """Score pairs of texts: by a cross-encoder, or by the cosine of their embeddings."""
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        message = f"text_2: has {len(second)} texts and text_1 has {len(first)}; give as many, or one text as text_1"
        raise ApiError(400, message, param="text_2", code="invalid_value")
    pairs = list(zip(first, second, strict=True))
    scoring = serving_of(request).similarity(
        request, body.model, pairs, truncate=body.truncate_prompt_tokens, names={"pair": "text_2"}
    )
    found = await until_disconnect(request, scoring)
    data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(found.scores)]
    head = {"id": f"score-{request.state.request_id}", "object": "list", "created": int(time.time())}
    return JSONResponse({**head, "model": found.model, "data": data, "usage": _usage(found.prompt_tokens)})


@router.post("/v1/rerank", response_model=Ranking, response_model_exclude_unset=True, responses=documented(404, 504))
@router.post("/rerank", response_model=Ranking, response_model_exclude_unset=True, responses=documented(404, 504))
async def create_ranking(request: Request, body: RerankRequest) -> Response:
    """Bring documents into the order in which they answer a query, as Jina's and Cohere's APIs do."""
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    pairs = [(body.query, text) for text in texts]
    scoring = serving_of(request).similarity(
        request, body.model, pairs, truncate=body.truncate_prompt_tokens, names={"pair": "documents"}
    )
    found = await until_disconnect(request, scoring)
    best_first = sorted(range(len(texts)), key=lambda i: -found.scores[i])
    results = []
    for index in best_first[: body.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": found.scores[index]}
        results.append(result | ({"document": {"text": texts[index]}} if body.return_documents else {}))
    head = {"id": f"rerank-{request.state.request_id}", "model": found.model}
    return JSONResponse({**head, "results": results, "usage": _usage(found.prompt_tokens)})


def _usage(n_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
