"""POST /v1/chat/completions: the next message of a conversation, as OpenAI's clients ask for it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu import __version__
from danlu.server.access.limits import ParsedRoute
from danlu.server.api.answer_parts import Part, Reasoning, Said, ToolCallArguments, ToolCallBegun
from danlu.server.api.chat_request import turn_of
from danlu.server.api.chat_schema import ChatRequest
from danlu.server.api.turn import Told, Turn, TurnEvent, TurnStream, open_turn, whole
from danlu.server.errors import ApiError, documented
from danlu.server.protocol import TokenLogprob
from danlu.server.schema import Reply
from danlu.server.serving import serving_of
from danlu.server.streaming import DOCUMENTED, EventStream, sse, until_disconnect

router = APIRouter(route_class=ParsedRoute)

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make one for each chunk

LEAST_LOGPROB = -9999.0
"""What OpenAI tells of a token that cannot be; JSON has no infinity."""


class TopLogprob(Reply):
    """A token that could have stood there. Bytes, as a token may be a part of a character."""

    token: str
    bytes: list[int]
    logprob: float


class Logprob(TopLogprob):
    """A token of the answer; thoughts are left out."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply):
    """Log probabilities of one answer."""

    content: list[Logprob]
    refusal: None


class FunctionCall(Reply):
    """A function that is to be called; arguments are the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Reply):
    """A tool that is to be called."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Reply):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = Field(None, description="What it thought. Not in OpenAI's API.")
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = Field(None, description="Where the request had functions. Deprecated.")


class Choice(Reply):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class PromptTokensDetails(Reply):
    """Tokens of the prompt that were in the cache."""

    cached_tokens: int


class CompletionTokensDetails(Reply):
    """Tokens of thoughts."""

    reasoning_tokens: int


class ChatUsage(Reply):
    """Tokens of the prompt and of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChatTimings(Reply):
    """As the engine measured them. Not in OpenAI's API."""

    queued_seconds: float
    first_token_seconds: float
    tokens_per_second: float


class ChatCompletion(Reply):
    """The answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: ChatUsage
    timings: ChatTimings | None = None


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": DOCUMENTED}, **documented(404, 504)},
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    turn = turn_of(body)
    if not body.stream:
        return JSONResponse(await until_disconnect(request, _whole(request, body, turn)))
    stack = contextlib.AsyncExitStack()
    stream = await stack.enter_async_context(open_turn(serving_of(request), request, turn))
    events = _events(request, body, stack, stream)
    await anext(events)  # from here on, closing the events closes the turn
    return EventStream(events)


async def _whole(request: Request, body: ChatRequest, turn: Turn) -> dict[str, Any]:
    async with open_turn(serving_of(request), request, turn) as stream:
        answers = await whole(stream)
        return {
            **_head(stream, "chat.completion"),
            "choices": [_choice(index, told, body.functions is not None) for index, told in enumerate(answers)],
            **_cost(stream),
        }


async def _events(
    request: Request, body: ChatRequest, stack: contextlib.AsyncExitStack, stream: TurnStream
) -> AsyncGenerator[bytes, None]:
    chunks = Chunks(
        _head(stream, "chat.completion.chunk"),
        with_usage=body.stream_options is not None and body.stream_options.include_usage is True,
        legacy=body.functions is not None,
    )
    async with stack:
        yield b""
        try:
            async for event in stream:
                yield chunks.of(event)
        except ApiError as error:
            request.state.error_code = error.code
            yield sse(error.body())
            return
    if chunks.with_usage:
        yield chunks.last(_cost(stream))
    yield sse("[DONE]")  # clients hang up on it: the stack is closed by then


class Chunks:
    """Events of a turn as chunks of a stream. There is one for each token of each stream, so they are written as text
    round what they have in common.

    Args:
        head: what all chunks begin with.
        with_usage: a last chunk tells the usage.
        legacy: calls are told as the `function_call` of the time before tools.
    """

    def __init__(self, head: dict[str, Any], *, with_usage: bool, legacy: bool) -> None:
        self.with_usage = with_usage
        self._legacy = legacy
        self._begin = f"data: {_json(head)[:-1]},"
        self._end = (',"usage":null' if with_usage else "") + "}\n\n"
        self._begun: set[int] = set()

    def of(self, event: TurnEvent) -> bytes:
        """The chunks of an event."""
        deltas: list[dict[str, Any]] = [_delta(part, self._legacy) for part in event.parts]
        if event.logprobs and not deltas:
            deltas = [{"content": ""}]
        if event.index not in self._begun:
            self._begun.add(event.index)
            deltas.insert(0, {"role": "assistant", "content": "", "refusal": None})
        logprobs = _logprobs(event.logprobs) if event.logprobs else None
        text = ""
        for number, delta in enumerate(deltas, 1):
            told = logprobs if number == len(deltas) else None
            text += self._chunk({"index": event.index, "delta": delta, "logprobs": told, "finish_reason": None})
        if event.finish_reason is not None:
            reason = _finish_reason(event.finish_reason, self._legacy)
            text += self._chunk({"index": event.index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return text.encode()

    def last(self, cost: dict[str, Any]) -> bytes:
        """The chunk that tells the usage."""
        return f'{self._begin}"choices":[],{_json(cost)[1:]}\n\n'.encode()

    def _chunk(self, choice: dict[str, Any]) -> str:
        return f'{self._begin}"choices":[{_json(choice)}]{self._end}'


def _delta(part: Part, legacy: bool) -> dict[str, Any]:
    match part:
        case Said(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case ToolCallBegun(call, id, name):
            function = {"name": name, "arguments": ""}
            call_delta = {"index": call, "id": id, "type": "function", "function": function}
        case ToolCallArguments(call, text):
            function = {"arguments": text}
            call_delta = {"index": call, "function": function}
    return {"function_call": function} if legacy else {"tool_calls": [call_delta]}


def _choice(index: int, told: Told, legacy: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": told.text, "refusal": None}
    if told.reasoning:
        message["reasoning_content"] = told.reasoning
    if told.tool_calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in told.tool_calls]
        message["content"] = told.text or None
        if legacy:
            message["function_call"] = functions[0]
        else:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": function}
                for call, function in zip(told.tool_calls, functions, strict=True)
            ]
    return {
        "index": index,
        "message": message,
        "logprobs": None if told.logprobs is None else _logprobs(told.logprobs),
        "finish_reason": _finish_reason(told.finish_reason, legacy),
    }


def _finish_reason(reason: str, legacy: bool) -> str:
    return "function_call" if legacy and reason == "tool_calls" else reason


def _logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(one.text, one.logprob) | {"top_logprobs": [_token(text, logprob) for _, text, logprob in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: bytes, logprob: float) -> dict[str, Any]:
    token = text.decode(errors="replace")
    return {"token": token, "bytes": list(text), "logprob": max(logprob, LEAST_LOGPROB)}


def _head(stream: TurnStream, kind: str) -> dict[str, Any]:
    answer = stream.answer
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": _fingerprint(answer.model),
    }


def _cost(stream: TurnStream) -> dict[str, Any]:
    """What is known in the end."""
    usage, timings = stream.answer.usage, stream.answer.timings
    cost: dict[str, Any] = {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": stream.reasoning_tokens},
        }
    }
    if timings is not None:
        cost["timings"] = {
            "queued_seconds": timings.queued_seconds,
            "first_token_seconds": timings.first_token_seconds,
            "tokens_per_second": timings.tokens_per_second,
        }
    return cost


@functools.cache
def _fingerprint(model: str) -> str:
    """Of what answers with the same seed in the same way: the build and the model."""
    return f"fp_{hashlib.sha256(f'{__version__} {model}'.encode()).hexdigest()[:10]}"
