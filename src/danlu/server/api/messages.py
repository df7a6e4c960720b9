"""Anthropic's Messages API."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from danlu.config import validate
from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.server.access.limits import ParsedRoute
from danlu.server.api.message_events import MessageWriter
from danlu.server.api.message_schema import (
    AnyChoice,
    Block,
    Choice,
    CountReply,
    CountTokens,
    CreateMessage,
    CustomTool,
    InputMessage,
    MessageReply,
    NoChoice,
    NoThinking,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from danlu.server.api.turn import Effort, JsonSchema, Named, Turn, TurnEvent, TurnStream, count_tokens, open_turn
from danlu.server.errors import ApiError, documented, from_user_error
from danlu.server.serving import serving_of
from danlu.server.streaming import DOCUMENTED, EventStream, sse, until_disconnect

router = APIRouter(tags=["messages"], route_class=ParsedRoute)

NAMES = {
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "json_schema": "output_config.format.schema",
    "structure": "output_config.format",
    "effort": "output_config.effort",
    "continue_last": "messages",
}
"""Options of the engine and of a turn -> fields of the API."""

PARAGRAPH = "\n\n"
"""Between blocks of text that a model reads as one."""

_ANSWERED: dict[int | str, dict[str, Any]] = {200: {"model": MessageReply, "content": DOCUMENTED}}


@router.post("/v1/messages", responses={**_ANSWERED, **documented(404, 429, 504, anthropic=True)})
async def create_message(request: Request, asked: CreateMessage) -> Response:
    """Answer a conversation, or go on with an answer that is its last message."""
    serving = serving_of(request)
    turn = _turn(asked, _params(asked))
    stack = AsyncExitStack()
    stream = await stack.enter_async_context(open_turn(serving, request, turn))
    writer = MessageWriter(_message(stream))
    if asked.stream:
        response: Response = EventStream(_events(request, stack, stream, writer, asked.max_tokens))
    else:
        response = JSONResponse(await until_disconnect(request, _whole(stack, stream, writer, asked.max_tokens)))
    response.headers["request-id"] = request.state.request_id
    return response


@router.post(
    "/v1/messages/count_tokens", responses={200: {"model": CountReply}, **documented(404, 429, anthropic=True)}
)
async def count_message_tokens(request: Request, asked: CountTokens) -> Response:
    """How many tokens a conversation has, as the model reads it."""
    n = await count_tokens(serving_of(request), request, _turn(asked, SamplingParams()))
    return JSONResponse({"input_tokens": n}, headers={"request-id": request.state.request_id})


async def _events(
    request: Request, stack: AsyncExitStack, stream: TurnStream, writer: MessageWriter, max_tokens: int
) -> AsyncGenerator[bytes, None]:
    try:
        async with stack:
            for sent in writer.begin():
                yield sent
            async for event in stream:
                for sent in writer.push(event):
                    yield sent
                if event.finish_reason is not None:
                    last = event
        for sent in writer.finish(_stop_reason(last, stream, max_tokens), last.stop_text, _usage(stream)):
            yield sent
    except ApiError as error:
        yield sse(error.body(request.url.path, request.state.request_id), "error")


async def _whole(stack: AsyncExitStack, stream: TurnStream, writer: MessageWriter, max_tokens: int) -> dict[str, Any]:
    async with stack:
        async for event in stream:
            writer.push(event)
            if event.finish_reason is not None:
                last = event
    writer.finish(_stop_reason(last, stream, max_tokens), last.stop_text, _usage(stream))
    return writer.message


def _message(stream: TurnStream) -> dict[str, Any]:
    """The message before anything of it was written."""
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": stream.answer.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(stream),
    }


def _stop_reason(last: TurnEvent, stream: TurnStream, max_tokens: int) -> str:
    if last.finish_reason == "tool_calls":
        return "tool_use"
    if last.finish_reason == "length":
        full = stream.answer.usage.completion_tokens < max_tokens
        return "model_context_window_exceeded" if full else "max_tokens"
    return "end_turn" if last.stop_text is None else "stop_sequence"


def _usage(stream: TurnStream) -> dict[str, Any]:
    used = stream.answer.usage
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"thinking_tokens": stream.reasoning_tokens},
    }


# -------------------------------------------------------------------------------------------------- the turn


def _turn(asked: CountTokens, params: SamplingParams) -> Turn:
    messages = [] if asked.system is None else [{"role": "system", "content": _text(asked.system)}]
    calls: set[str] = set()
    for i, message in enumerate(asked.messages):
        messages += _chat_messages(message, calls, f"messages.{i}")
    config, choice = asked.output_config, asked.tool_choice
    effort: Effort | None = config.effort if config is not None else None
    names = NAMES
    if isinstance(asked.thinking, NoThinking):
        if effort is not None:
            raise _refused("output_config.effort", "tells how much to think, and thinking is disabled; leave out one")
        effort, names = "none", NAMES | {"effort": "thinking.type"}
    return Turn(
        model=asked.model,
        messages=messages,
        tools=_chat_tools(asked.tools or []),
        tool_choice=_choice(choice, asked.tools or []),
        parallel_tool_calls=not getattr(choice, "disable_parallel_tool_use", False),
        structure=JsonSchema(config.format.schema_) if config is not None and config.format is not None else None,
        params=params,
        names=names,
        effort=effort,
        continue_last=asked.messages[-1].role == "assistant",
    )


def _params(asked: CreateMessage) -> SamplingParams:
    given: dict[str, Any] = {"max_new_tokens": asked.max_tokens, "stop": tuple(asked.stop_sequences or ())}
    if asked.temperature is not None:
        given["temperature"] = asked.temperature
    if asked.top_p is not None:
        given["top_p"] = max(asked.top_p, sys.float_info.min)  # the likeliest token is kept even at 0
    if asked.top_k is not None:
        given["top_k"] = asked.top_k
    try:
        return validate(SamplingParams(**given))
    except DanluError as error:
        raise from_user_error(error, NAMES) from None


def _choice(choice: Choice | None, tools: list[CustomTool]) -> Literal["auto", "none", "required"] | Named:
    if isinstance(choice, ToolChoice):
        if choice.name not in {tool.name for tool in tools}:
            raise _refused("tool_choice.name", f"there is no tool {choice.name!r} among tools")
        return Named(choice.name)
    if isinstance(choice, AnyChoice):
        if not tools:
            raise _refused("tool_choice", "a tool is to be used, and there are no tools")
        return "required"
    return "none" if isinstance(choice, NoChoice) else "auto"


def _chat_tools(tools: list[CustomTool]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        if tool.name in found:
            raise _refused(f"tools.{i}.name", f"there are two {tool.name!r}")
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema, "strict": bool(tool.strict)}
        if tool.description is not None:
            function["description"] = tool.description
        found[tool.name] = {"type": "function", "function": function}
    return list(found.values())


def _chat_messages(message: InputMessage, calls: set[str], where: str) -> list[dict[str, Any]]:
    """A message as OpenAI's chat has it: each result of a tool is one of its own.

    Args:
        calls: ids of tool uses so far; those of this message are added.
    """
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant(message.content, calls)]
    found: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in calls:
                raise _refused(
                    where, f"a result belongs to the tool use {block.tool_use_id!r}, which is nowhere before it"
                )
            text = f"Error: {_text(block.content)}" if block.is_error else _text(block.content)
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif isinstance(block, TextBlock):
            if found and found[-1]["role"] == message.role:
                found[-1]["content"] += PARAGRAPH + block.text
            else:
                found.append({"role": message.role, "content": block.text})
    return found or [{"role": message.role, "content": ""}]


def _assistant(blocks: list[Block], calls: set[str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    message["content"] = PARAGRAPH.join(block.text for block in blocks if isinstance(block, TextBlock))
    if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
        message["reasoning_content"] = PARAGRAPH.join(thoughts)
    if uses := [block for block in blocks if isinstance(block, ToolUseBlock)]:
        message["tool_calls"] = [_call(use) for use in uses]
        calls.update(use.id for use in uses)
    return message


def _call(use: ToolUseBlock) -> dict[str, Any]:
    function = {"name": use.name, "arguments": json.dumps(use.input, ensure_ascii=False)}
    return {"id": use.id, "type": "function", "function": function}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else PARAGRAPH.join(block.text for block in content)


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
