"""A request for a chat completion as the turn that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from danlu.server.api.chat_schema import (
    AssistantMessage,
    ChatRequest,
    FunctionMessage,
    FunctionName,
    JsonObjectFormat,
    JsonSchemaFormat,
    RefusalPart,
    TextPart,
    ToolMessage,
)
from danlu.server.api.sampling_fields import NAMES
from danlu.server.api.turn import JsonObject, JsonSchema, Named, Turn
from danlu.server.errors import ApiError
from danlu.server.serving import AS_MANY_AS_FIT


def turn_of(body: ChatRequest) -> Turn:
    """What the request asks for.

    Raises:
        ApiError: its fields contradict each other.
    """
    _require_consistent(body)
    limit = body.max_completion_tokens or body.max_tokens
    names = {
        **NAMES,
        "max_new_tokens": "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        "tools": "tools" if body.functions is None else "functions",
        "structure": "response_format",
        "effort": "reasoning_effort",
        "template_options": "chat_template_kwargs",
        "continue_last": "continue_final_message",
    }
    return Turn(
        model=body.model,
        messages=_messages(body),
        tools=_tools(body),
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False and body.functions is None,
        structure=_structure(body),
        params=body.params(
            max_new_tokens=limit or AS_MANY_AS_FIT, logprobs=(body.top_logprobs or 0) if body.logprobs else None
        ),
        names=names,
        template_options=body.chat_template_kwargs or {},
        effort=body.reasoning_effort,
        continue_last=body.continue_final_message is True,
    )


def _require_consistent(body: ChatRequest) -> None:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise _refused("max_tokens", "is not the same as max_completion_tokens; leave it out")
    if body.top_logprobs and not body.logprobs:
        raise _refused("top_logprobs", "belongs to logprobs; set that to true")
    if body.stream_options is not None and not body.stream:
        raise _refused("stream_options", "belongs to stream; set that to true")
    if body.functions is not None and body.tools:
        raise _refused("functions", "is the older name of tools; leave it out")
    for choice, what in (("tool_choice", "tools"), ("function_call", "functions")):
        if getattr(body, choice) not in (None, "none", "auto") and not getattr(body, what):
            raise _refused(choice, f"belongs to {what}; give some")
    if body.add_generation_prompt is False and not body.continue_final_message:
        raise _refused("add_generation_prompt", "can be false only with continue_final_message")
    if body.add_generation_prompt and body.continue_final_message:
        raise _refused("continue_final_message", "is not possible with add_generation_prompt; leave one out")


def _messages(body: ChatRequest) -> list[dict[str, Any]]:
    """OpenAI's dicts, contents as text, functions as tools."""
    messages: list[dict[str, Any]] = []
    open_calls: list[str] = []
    calls_at = ""
    for index, message in enumerate(body.messages):
        plain: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
        if message.name is not None:
            plain["name"] = message.name
        if isinstance(message, ToolMessage | FunctionMessage):
            where = f"messages.{index}.{'tool_call_id' if isinstance(message, ToolMessage) else 'name'}"
            id = message.tool_call_id if isinstance(message, ToolMessage) else _function_id(message.name)
            if id not in open_calls:
                raise _refused(where, "answers no call of the assistant's message before it")
            open_calls.remove(id)
            messages.append(plain | {"role": "tool", "tool_call_id": id})
            continue
        if open_calls:
            raise _refused(calls_at, f"the call {open_calls[0]!r} has no message that tells its result")
        if isinstance(message, AssistantMessage):
            plain |= _said(message, f"messages.{index}")
            calls_at = f"messages.{index}.tool_calls"
            open_calls = [call["id"] for call in plain.get("tool_calls", ())]
            if len(set(open_calls)) < len(open_calls):
                raise _refused(calls_at, "two calls have the same id")
        messages.append(plain)
    if open_calls:
        raise _refused(calls_at, f"the call {open_calls[0]!r} has no message that tells its result")
    return messages


def _said(message: AssistantMessage, where: str) -> dict[str, Any]:
    """What only a message of the assistant has."""
    said: dict[str, Any] = {}
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        said["reasoning_content"] = reasoning
    if message.refusal is not None:
        said["refusal"] = message.refusal
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.model_dump()} for call in message.tool_calls
        ]
    elif message.function_call is not None:
        function = message.function_call
        id = _function_id(function.name)
        said["tool_calls"] = [{"id": id, "type": "function", "function": function.model_dump()}]
    if not said and message.content is None:
        raise _refused(f"{where}.content", "is missing; an assistant's message has content or tool_calls")
    return said


def _function_id(name: str) -> str:
    """Functions of the time before tools had no ids."""
    return f"call_{name}"


def _text(content: str | Sequence[TextPart | RefusalPart] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    functions = body.functions if body.functions is not None else [tool.function for tool in body.tools or ()]
    names = [function.name for function in functions]
    field = "tools" if body.functions is None else "functions"
    for index, name in enumerate(names):
        if name in names[:index]:
            raise _refused(f"{field}.{index}", f"another function is called {name!r}, too")
    return [{"type": "function", "function": function.model_dump(exclude_none=True)} for function in functions]


def _tool_choice(body: ChatRequest) -> Literal["auto", "none", "required"] | Named:
    field, choice = (
        ("tool_choice", body.tool_choice) if body.functions is None else ("function_call", body.function_call)
    )
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return choice
    name = choice.name if isinstance(choice, FunctionName) else choice.function.name
    functions = body.functions if body.functions is not None else [tool.function for tool in body.tools or ()]
    if name not in {function.name for function in functions}:
        raise _refused(field, f"there is no function {name!r}")
    return Named(name)


def _structure(body: ChatRequest) -> JsonObject | JsonSchema | None:
    form = body.response_format
    if isinstance(form, JsonObjectFormat):
        return JsonObject()
    if isinstance(form, JsonSchemaFormat):
        wanted = form.json_schema
        return JsonSchema(wanted.json_schema if wanted.json_schema is not None else {}, strict=wanted.strict is True)
    return None


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
