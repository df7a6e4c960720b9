"""OpenAI's Responses API: answers that are kept, and conversations that go on from them."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.responses import JSONResponse, Response

from danlu.config import validate
from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.server.access.keys import caller_of
from danlu.server.access.limits import ParsedRoute
from danlu.server.api.response_events import ResponseWriter
from danlu.server.api.response_items import ItemDict, input_items, messages_of, new_id
from danlu.server.api.response_jobs import Job, jobs_of
from danlu.server.api.response_replies import DeletedReply, InputTokensReply, ItemListReply, ResponseReply
from danlu.server.api.response_schema import (
    AllowedTools,
    Asked,
    CreateResponse,
    FunctionChoice,
    FunctionTool,
    Include,
    JsonObjectFormat,
    JsonSchemaFormat,
)
from danlu.server.api.response_store import ResponseStore, Stored
from danlu.server.api.turn import JsonObject, JsonSchema, Named, Turn, count_tokens, open_turn
from danlu.server.errors import ApiError, documented, from_user_error
from danlu.server.serving import AS_MANY_AS_FIT, Serving, serving_of
from danlu.server.streaming import DOCUMENTED, EventStream, sse, until_disconnect

router = APIRouter(tags=["responses"], route_class=ParsedRoute)

NAMES = {
    "max_new_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "json_schema": "text.format.schema",
    "messages": "input",
    "structure": "text.format",
    "effort": "reasoning.effort",
}
"""Options of the engine and of a turn -> fields of the API."""

LOST = "the server ended while it wrote this response"

ResponseId = Annotated[str, Path(min_length=1, max_length=128)]


def _check_included(request: Request) -> None:
    """``include`` asks for nothing that is not told anyway; OpenAI's client calls it ``include[]``."""
    for name in ("include", "include[]"):
        for value in request.query_params.getlist(name):
            if value not in get_args(Include):
                message = f"include: {value[:100]!r} is not supported by this server; leave it out"
                raise ApiError(400, message, param="include", code="invalid_value")


INCLUDED = [Depends(_check_included)]

_STREAMED: dict[int | str, dict[str, Any]] = {200: {"model": ResponseReply, "content": DOCUMENTED}}


@router.post("/v1/responses", responses={**_STREAMED, **documented(404, 429, 504)})
async def create_response(request: Request, asked: CreateResponse) -> Response:
    """Answer an input: text, messages, results of functions, or what goes on from an earlier response."""
    _check(asked)
    serving, jobs = serving_of(request), jobs_of(request)
    job = await _begin(serving, request, asked)
    if asked.background:
        jobs.run(job)
        return EventStream(job.follow(-1)) if asked.stream else JSONResponse(job.response)
    if asked.stream:
        return EventStream(jobs.write(job))
    return JSONResponse(await until_disconnect(request, jobs.whole(job)))


@router.post("/v1/responses/input_tokens", responses={200: {"model": InputTokensReply}, **documented(404, 429)})
async def count_input_tokens(request: Request, asked: Asked) -> Response:
    """How many tokens an input has, as the model reads it."""
    _check_tools(asked)
    serving = serving_of(request)
    items = await _conversation(serving, request, asked) + input_items(asked.input)
    n = await count_tokens(serving, request, _turn(asked, items, SamplingParams()))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": n})


@router.get("/v1/responses/{response_id}", responses={**_STREAMED, **documented(404)}, dependencies=INCLUDED)
async def get_response(
    request: Request,
    response_id: ResponseId,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, lt=1 << 53)] = None,
    include_obfuscation: bool = False,
) -> Response:
    """A response as it stands. With ``stream``: the events of one that was asked for with ``background``, to its end,
    from the one whose number is ``starting_after`` + 1. It holds what whoever asked for it wanted to be included."""
    if include_obfuscation:
        raise ApiError(400, "include_obfuscation: events are never padded", param="include_obfuscation")
    if starting_after is not None and not stream:
        raise ApiError(400, "starting_after: belongs to streams; set stream, or leave it out", param="starting_after")
    after = -1 if starting_after is None else starting_after
    caller = caller_of(request).id
    job = jobs_of(request).get(caller, response_id)
    if job is None:
        stored = _found(await ResponseStore(serving_of(request).database).get(caller, response_id))
        response, events = stored.response, _from(stored, after)
    else:
        response, events = job.response, job.follow(after)
    if not stream:
        return JSONResponse(response)
    if not response["background"]:
        message = "stream: only the events of a response that was asked for with background are kept; leave it out"
        raise ApiError(400, message, param="stream", code="invalid_value")
    return EventStream(events)


@router.delete("/v1/responses/{response_id}", responses={200: {"model": DeletedReply}, **documented(404)})
async def delete_response(request: Request, response_id: ResponseId) -> Response:
    """Forget a response; one that is written in the background is ended. What goes on from it cannot go on any more."""
    caller = caller_of(request).id
    job = jobs_of(request).get(caller, response_id)
    await ResponseStore(serving_of(request).database).delete(caller, response_id)
    if job is not None:
        await job.cancel()
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", responses={200: {"model": ResponseReply}, **documented(404)})
async def cancel_response(request: Request, response_id: ResponseId) -> Response:
    """End a response that is written in the background. One that has ended already is answered as it is."""
    caller = caller_of(request).id
    job = jobs_of(request).get(caller, response_id)
    if job is not None and job.response["background"]:
        await job.cancel()
        return JSONResponse(job.response)
    store = ResponseStore(serving_of(request).database)
    response = job.response if job is not None else _found(await store.get(caller, response_id)).response
    if not response["background"]:
        message = "response_id: only a response that was asked for with background can be cancelled"
        raise ApiError(400, message, param="response_id", code="invalid_value")
    return JSONResponse(response)


@router.get(
    "/v1/responses/{response_id}/input_items",
    responses={200: {"model": ItemListReply}, **documented(404)},
    dependencies=INCLUDED,
)
async def list_input_items(
    request: Request,
    response_id: ResponseId,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a response had as its input: all items, those of the responses that it goes on from included."""
    items = await ResponseStore(serving_of(request).database).input(caller_of(request).id, response_id)
    if order == "desc":
        items.reverse()
    place = 0
    if after is not None:
        place = next((i for i, item in enumerate(items, 1) if item["id"] == after), -1)
        if place < 0:
            raise ApiError(400, f"after: there is no item {after!r}", param="after", code="invalid_value")
    page = items[place : place + limit]
    return JSONResponse({
        "object": "list", "data": page, "has_more": place + limit < len(items),
        "first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else "",
    })  # fmt: skip


# -------------------------------------------------------------------------------------------------- underneath


def _check(asked: CreateResponse) -> None:
    """What no field can tell alone."""
    if asked.background and asked.store is False:
        message = "background: a response that runs on by itself is stored; leave out store, or set it to true"
        raise ApiError(400, message, param="background", code="invalid_value")
    if asked.stream_options is not None and not asked.stream:
        message = "stream_options: belongs to streams; set stream, or leave it out"
        raise ApiError(400, message, param="stream_options", code="invalid_value")
    _check_tools(asked)


def _check_tools(asked: Asked) -> None:
    choice, names = asked.tool_choice, set()
    for i, tool in enumerate(asked.tools or []):
        if tool.name in names:
            param = f"tools.{i}.name"
            raise ApiError(400, f"{param}: there are two {tool.name!r}", param=param, code="invalid_value")
        names.add(tool.name)
    if choice == "required" and not names:
        raise ApiError(400, "tool_choice: a tool is to be called, and there are none", param="tool_choice")
    wanted = choice.tools if isinstance(choice, AllowedTools) else [choice]
    for one in wanted:
        if isinstance(one, FunctionChoice) and one.name not in names:
            message = f"tool_choice: there is no tool {one.name!r} among tools"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")


async def _begin(serving: Serving, request: Request, asked: CreateResponse) -> Job:
    """The response that was asked for; nothing of it is written yet, but whatever can be refused was."""
    store, caller = ResponseStore(serving.database), caller_of(request).id
    own = input_items(asked.input)
    turn = _turn(asked, await _conversation(serving, request, asked) + own, _params(asked))
    async with AsyncExitStack() as stack:
        stream = await stack.enter_async_context(open_turn(serving, request, turn))
        response = new_response(asked, stream.answer.model)
        if asked.store is not False:
            await store.add(caller, response, own)
        writer = ResponseWriter(response, logprobs=turn.params.logprobs is not None)
        return Job(caller, writer, stream, stack.pop_all(), None if asked.store is False else store)


async def _conversation(serving: Serving, request: Request, asked: Asked) -> list[ItemDict]:
    """What went before."""
    if asked.previous_response_id is None:
        return []
    return await ResponseStore(serving.database).conversation(caller_of(request).id, asked.previous_response_id)


def _turn(asked: Asked, items: list[ItemDict], params: SamplingParams) -> Turn:
    choice, tools = asked.tool_choice or "auto", asked.tools or []
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
    wanted = asked.text.format if asked.text is not None else None
    structure: JsonObject | JsonSchema | None = None
    if isinstance(wanted, JsonSchemaFormat):
        structure = JsonSchema(wanted.schema_)
    elif isinstance(wanted, JsonObjectFormat):
        structure = JsonObject()
    return Turn(
        model=asked.model,
        messages=messages_of(items, asked.instructions),
        tools=[_chat_tool(tool) for tool in tools],
        tool_choice=Named(choice.name) if isinstance(choice, FunctionChoice) else choice,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        structure=structure,
        params=params,
        names=NAMES,
        effort=asked.reasoning.effort if asked.reasoning is not None else None,
    )


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _params(asked: CreateResponse) -> SamplingParams:
    given: dict[str, Any] = {"max_new_tokens": asked.max_output_tokens or AS_MANY_AS_FIT}
    if asked.temperature is not None:
        given["temperature"] = asked.temperature
    if asked.top_p is not None:
        given["top_p"] = max(asked.top_p, sys.float_info.min)  # the likeliest token is kept even at 0
    if asked.include or asked.top_logprobs is not None:
        given["logprobs"] = asked.top_logprobs or 0
    try:
        return validate(SamplingParams(**given))
    except DanluError as error:
        raise from_user_error(error, NAMES) from None


def new_response(asked: CreateResponse, model: str) -> dict[str, Any]:
    """The response before anything of it was written."""
    reasoning = asked.reasoning
    wanted = None if asked.text is None or asked.text.format is None else asked.text.format
    choice = asked.tool_choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(asked.background),
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() | {"strict": bool(tool.strict)} for tool in asked.tools or []],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


def _found(stored: Stored) -> Stored:
    """A stored response which nobody writes any more."""
    if stored.response["status"] == "in_progress":
        stored.response.update(status="failed", error={"code": "server_error", "message": LOST})
    return stored


async def _from(stored: Stored, after: int) -> AsyncGenerator[bytes, None]:
    """The events of a response that has ended, from the one whose number is ``after`` + 1."""
    if stored.events is None:  # those that were sent are lost with the server that sent them
        kind = "response.failed"
        yield sse({"type": kind, "sequence_number": after + 1, "response": stored.response}, kind)
        return
    for event in stored.events[after + 1 :]:
        yield event
