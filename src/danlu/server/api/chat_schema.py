"""Bodies of OpenAI's chat completions: what is asked for.

A field that is not declared here is refused by name, and so are those that are declared with null alone. These are
taken although they change nothing: ``user``, ``metadata``, ``safety_identifier``, ``prompt_cache_key`` (known prefixes
are always reused), ``service_tier`` "auto" or "default", ``store`` false, ``verbosity`` "medium". The ``name`` of a
message goes to the chat template, which may have no place for it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from danlu.server.api.inputs import ModelName
from danlu.server.api.sampling_fields import MOST_TOKENS, SamplingFields, StreamOptions
from danlu.server.api.tagged import by_type
from danlu.server.schema import Body, JsonObject, Metadata, Text

MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, MOST_CALLS, MOST_TOP_LOGPROBS = 10_000, 10_000, 128, 128, 20

Id = Annotated[str, Field(min_length=1, max_length=128)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
ShortText = Annotated[str, Field(max_length=512)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


def _only(*values: Any) -> BeforeValidator:
    """Anything but these values and null is refused by name."""

    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            raise PydanticCustomError("extra_forbidden", "is not supported")
        return value

    return BeforeValidator(check)


Unsupported = Annotated[None, _only()]

# ------------------------------------------------------------------------------------------------ messages


class TextPart(Body):
    """A piece of the text of a message."""

    type: Literal["text"]
    text: Text


class RefusalPart(Body):
    """Words in which a model refused."""

    type: Literal["refusal"]
    refusal: Text


def _no_media(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("image_url", "input_audio", "file"):
        raise ValueError(f"content part of type {kind!r}: multimodal models are not served yet; send text")
    return value


TextParts = Annotated[
    Annotated[TextPart, Tag("TextPart")], *by_type({"text": TextPart}, "content part"), BeforeValidator(_no_media)
]
AssistantParts = Annotated[
    Annotated[TextPart, Tag("TextPart")] | Annotated[RefusalPart, Tag("RefusalPart")],
    *by_type({"text": TextPart, "refusal": RefusalPart}, "content part"),
    BeforeValidator(_no_media),
]
_text_or_parts = Discriminator(lambda value: "list[Part]" if isinstance(value, list) else "str")
Content = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[TextParts], Field(min_length=1, max_length=MOST_PARTS), Tag("list[Part]")],
    _text_or_parts,
]
AssistantContent = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[AssistantParts], Field(min_length=1, max_length=MOST_PARTS), Tag("list[Part]")],
    _text_or_parts,
]


class SystemMessage(Body):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Content
    name: ShortText | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: ShortText | None = None


class CalledFunction(Body):
    """A function and its arguments, as JSON text."""

    name: Name
    arguments: Text


class ToolCall(Body):
    """A call that the model made."""

    id: Id
    type: Literal["function"]
    function: CalledFunction
    index: int | None = Field(None, description="Of a call that was streamed; not read.")


class AssistantMessage(Body):
    """What the model said."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    name: ShortText | None = None
    refusal: Text | None = Field(None, description="Read as content where there is none.")
    reasoning_content: Text | None = Field(None, description="What it thought. Not in OpenAI's API.")
    reasoning: Text | None = Field(None, description="Another name of reasoning_content.")
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_CALLS)
    function_call: CalledFunction | None = Field(None, description="Deprecated.")
    annotations: list[JsonObject] | None = Field(None, max_length=1000, description="Handed back; not read.")
    audio: Unsupported = None


class ToolMessage(Body):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Id
    name: ShortText | None = None


class FunctionMessage(Body):
    """What a function gave. Deprecated."""

    role: Literal["function"]
    content: Text | None
    name: Name


_roles: dict[str, type[Body]] = {
    "system": SystemMessage, "developer": SystemMessage, "user": UserMessage, "assistant": AssistantMessage,
    "tool": ToolMessage, "function": FunctionMessage,
}  # fmt: skip
Message = Annotated[
    Annotated[SystemMessage, Tag("SystemMessage")]
    | Annotated[UserMessage, Tag("UserMessage")]
    | Annotated[AssistantMessage, Tag("AssistantMessage")]
    | Annotated[ToolMessage, Tag("ToolMessage")]
    | Annotated[FunctionMessage, Tag("FunctionMessage")],
    *by_type(_roles, "message", key="role"),
]

# ------------------------------------------------------------------------------------------------ tools and structure


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="JSON schema of the arguments. None: there are none.")
    strict: bool | None = Field(
        None, description="Arguments always follow the schema, also in calls that are not forced."
    )


class FunctionTool(Body):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: Function


Tool = Annotated[Annotated[FunctionTool, Tag("FunctionTool")], *by_type({"function": FunctionTool}, "tool")]


class FunctionName(Body):
    """Names a function."""

    name: Name


class NamedTool(Body):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


_named_tool = Annotated[Annotated[NamedTool, Tag("NamedTool")], *by_type({"function": NamedTool}, "tool choice")]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")] | Annotated[_named_tool, Tag("NamedTool")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "NamedTool"),
]
FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("str")] | Annotated[FunctionName, Tag("FunctionName")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "FunctionName"),
]


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema, which is followed whether or not it is strict."""

    name: Name
    description: Text | None = Field(None, description="Not read: tell the model in a message what the answer is for.")
    json_schema: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("TextFormat")]
    | Annotated[JsonObjectFormat, Tag("JsonObjectFormat")]
    | Annotated[JsonSchemaFormat, Tag("JsonSchemaFormat")],
    *by_type({"text": TextFormat, "json_object": JsonObjectFormat, "json_schema": JsonSchemaFormat}, "response format"),
]

# ------------------------------------------------------------------------------------------------ the request


class ChatRequest(SamplingFields):
    """A conversation whose next message is asked for."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="Default: what fits the context.")
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Log probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP_LOGPROBS, description="With so many of the most likely tokens. Only with logprobs."
    )
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description="Default: auto.")
    parallel_tool_calls: bool | None = Field(
        None, description="Whether an answer may hold several calls. Default: true."
    )
    functions: list[Function] | None = Field(
        None, min_length=1, max_length=MOST_TOOLS, description="Deprecated: tools."
    )
    function_call: FunctionChoice | None = Field(None, description="Deprecated: tool_choice.")
    reasoning_effort: Effort | None = Field(
        None, description="Where the model's chat template can be told: by reasoning_effort, or to think or not (none)."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")

    chat_template_kwargs: JsonObject | None = Field(
        None, description="Further variables for the chat template. Not in OpenAI's API."
    )
    continue_final_message: bool | None = Field(
        None, description="The last message is the beginning of the answer. Not in OpenAI's API."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Can be false only with continue_final_message. Not in OpenAI's API."
    )

    user: ShortText | None = Field(None, description="Accepted, and of no effect.")
    metadata: Metadata | None = Field(None, description="Accepted, and of no effect.")
    safety_identifier: ShortText | None = Field(None, description="Accepted, and of no effect.")
    prompt_cache_key: ShortText | None = Field(None, description="Accepted: known prefixes are always reused.")
    prompt_cache_retention: Annotated[Literal["in_memory"] | None, _only("in_memory")] = None
    store: Annotated[Literal[False] | None, _only(False)] = Field(None, description="Nothing is stored.")
    service_tier: Annotated[Literal["auto", "default"] | None, _only("auto", "default")] = None
    verbosity: Annotated[Literal["medium"] | None, _only("medium")] = None
    modalities: Annotated[list[Literal["text"]] | None, _only(["text"])] = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    web_search_options: Unsupported = None
