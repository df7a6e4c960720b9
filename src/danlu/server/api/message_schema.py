"""Bodies of Anthropic's Messages API: what is asked for, and what is answered.

A field that is not declared here is refused by name. These are taken although they change nothing: ``cache_control``
and ``eager_input_streaming`` (known prefixes are always reused, arguments always streamed), ``metadata.user_id``, and
``thinking`` of type "adaptive" (the model thinks as it does by itself).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from danlu.engine.config import LONGEST_STRING, MOST_STRINGS
from danlu.server.api.tagged import by_type
from danlu.server.schema import Body, JsonObject, Reply, Text

MOST_MESSAGES, MOST_BLOCKS, MOST_TOOLS = 10_000, 10_000, 128

Id = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]


class CacheControl(Body):
    """Where a prefix that is worth keeping ends."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


Cached = CacheControl | None

# ------------------------------------------------------------------------------------------------ messages


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: Text
    cache_control: Cached = None
    citations: Annotated[list[JsonObject], Field(max_length=0)] | None = None


class ThinkingBlock(Body):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = Field("", description="Not read: thoughts are not signed here.")


class DirectCaller(Body):
    """The model itself."""

    type: Literal["direct"]


class ToolUseBlock(Body):
    """The model used a tool."""

    type: Literal["tool_use"]
    id: Id
    name: Name
    input: JsonObject
    caller: DirectCaller | None = None
    toolset_name: None = None
    cache_control: Cached = None


_result_block = by_type({"text": TextBlock}, "content")
Texts = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[
        list[Annotated[Annotated[TextBlock, Tag("TextBlock")], *_result_block]],
        Field(max_length=MOST_BLOCKS),
        Tag("list[TextBlock]"),
    ],
    Discriminator(lambda value: "list[TextBlock]" if isinstance(value, list) else "str"),
]


class ToolResultBlock(Body):
    """What the tool gave."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Texts = ""
    is_error: bool | None = Field(None, description='The model reads "Error: " before the content.')
    toolset_name: None = None
    cache_control: Cached = None


_blocks = {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock, "tool_result": ToolResultBlock}
Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")],
    *by_type(_blocks, "content"),
]
Content = Annotated[
    Annotated[Text, Tag("str")] | Annotated[list[Block], Field(max_length=MOST_BLOCKS), Tag("list[Block]")],
    Discriminator(lambda value: "list[Block]" if isinstance(value, list) else "str"),
]

_SAYS = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class InputMessage(Body):
    """A message of a conversation. The assistant's, where it is the last, is the beginning of the answer."""

    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _who_says_what(self) -> InputMessage:
        for block in self.content if isinstance(self.content, list) else []:
            if not isinstance(block, _SAYS[self.role]):
                raise ValueError(f"content: the role {self.role!r} has no blocks of type {block.type!r}")
        return self


# ------------------------------------------------------------------------------------------------ tools, options


class CustomTool(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Name
    description: Text | None = None
    input_schema: JsonObject = Field(description="A JSON schema of the input.")
    strict: bool | None = Field(None, description="The input always follows the schema. Default: false.")
    eager_input_streaming: bool | None = None
    cache_control: Cached = None


Tool = Annotated[Annotated[CustomTool, Tag("CustomTool")], *by_type({"custom": CustomTool}, "tool", default="custom")]


class AutoChoice(Body):
    """The model chooses."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body):
    """One tool or several are to be used."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Body):
    """This tool is to be used."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    """No tool is to be used."""

    type: Literal["none"]


_choices = {"auto": AutoChoice, "any": AnyChoice, "tool": ToolChoice, "none": NoChoice}
Choice = Annotated[
    Annotated[AutoChoice, Tag("AutoChoice")]
    | Annotated[AnyChoice, Tag("AnyChoice")]
    | Annotated[ToolChoice, Tag("ToolChoice")]
    | Annotated[NoChoice, Tag("NoChoice")],
    *by_type(_choices, "tool_choice"),
]


class AdaptiveThinking(Body):
    """The model thinks as it does by itself."""

    type: Literal["adaptive"]


class NoThinking(Body):
    """The model does not think, where its chat template can tell it so."""

    type: Literal["disabled"]


# There is no type "enabled": nothing here could hold a model to its budget_tokens.
Thinking = Annotated[
    Annotated[AdaptiveThinking, Tag("AdaptiveThinking")] | Annotated[NoThinking, Tag("NoThinking")],
    *by_type({"adaptive": AdaptiveThinking, "disabled": NoThinking}, "thinking"),
]


class JsonFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is built."""

    effort: Literal["low", "medium", "high", "xhigh"] | None = Field(
        None, description="How much the model thinks, where its chat template knows it."
    )
    format: JsonFormat | None = None


class RequestMetadata(Body):
    """Whom the request is for."""

    user_id: Annotated[str, Field(max_length=512)] | None = None


# ------------------------------------------------------------------------------------------------ requests


class CountTokens(Body):
    """What the tokens of a prompt are counted with."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: list[InputMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    system: Texts | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Choice | None = Field(None, description="Default: auto.")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Cached = None


class CreateMessage(CountTokens):
    """What a message is asked for with."""

    max_tokens: Annotated[int, Field(ge=1, lt=1 << 24)] = Field(description="Thoughts included.")
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_STRING)]], Field(max_length=MOST_STRINGS)]
        | None
    ) = Field(None, description="Texts that end the answer; they are not part of it.")
    temperature: float | None = Field(None, ge=0, le=1, description="0 always takes the most likely token. Default: 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Keep the likeliest tokens that make up this share.")
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = Field(
        None, description="Keep the k most likely tokens; 0 keeps all."
    )
    stream: bool | None = None
    metadata: RequestMetadata | None = None


# ------------------------------------------------------------------------------------------------ replies


class OutputTokensDetails(Reply):
    """Of the output's tokens."""

    thinking_tokens: int


class MessageUsage(Reply):
    """What a message has cost. All tokens of the prompt are input_tokens + cache_read_input_tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageReply(Reply):
    """A message of the model's."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]] = Field(description="Blocks: thinking, text, tool_use.")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    stop_sequence: str | None
    usage: MessageUsage


class CountReply(Reply):
    """How many tokens a prompt has."""

    input_tokens: int
