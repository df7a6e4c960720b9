"""Bodies and replies of the conversations' routes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from danlu.server.schema import Body, JsonObject, Reply, Text

TEXT_BYTES = 1 << 20
"""Of a message, or of a system prompt, in UTF-8."""

PARAMETER_BYTES = 1 << 16
"""Of a conversation's parameters, as JSON."""


def _require_short(text: str) -> str:
    if len(text.encode()) > TEXT_BYTES:
        raise ValueError(f"is longer than {TEXT_BYTES >> 20} MiB")
    return text


def _require_small(value: JsonObject) -> JsonObject:
    if len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) > PARAMETER_BYTES:
        raise ValueError(f"is longer than {PARAMETER_BYTES >> 10} KiB")
    return value


Id = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$", max_length=64)]
Title = Annotated[str, Field(max_length=200)]
LongText = Annotated[str, Field(max_length=TEXT_BYTES), AfterValidator(_require_short)]
Name = Annotated[str, Field(max_length=512)]
Time = Annotated[float, Field(ge=0, le=1e11, description="Seconds since 1970.")]
Parameters = Annotated[dict[str, Any], Field(max_length=256), AfterValidator(_require_small)]
Models = Annotated[list[Name], Field(max_length=16)]
Leaves = Annotated[list[Id], Field(max_length=16)]
Stats = Annotated[
    dict[Annotated[str, Field(max_length=64)], float | None],
    Field(
        max_length=16,
        description="Numbers of an answer: first_token_seconds, tokens_per_second, prompt_tokens, completion_tokens.",
    ),
]
TokenText = Annotated[str, Field(max_length=1024)]
Alternative = Annotated[tuple[TokenText, float], Strict(False)]  # strict, it would be no list, which JSON has alone
Alternatives = Annotated[list[Alternative], Field(max_length=20)]
TokenLogprob = Alternative | Annotated[tuple[TokenText, float, Alternatives], Strict(False)]
Logprobs = Annotated[
    list[TokenLogprob],
    Field(
        max_length=1 << 17,
        description="Of each token: text, log probability, and perhaps the same of others that might have stood there.",
    ),
]


class ToolCall(Body):
    """A function that the model wants called."""

    id: Annotated[str, Field(max_length=128)] | None = None
    name: Annotated[str, Field(max_length=256)]
    arguments: LongText = Field(description="JSON, as the model wrote it.")


class ConversationFields(Body):
    """What a client chooses of a conversation."""

    title: Title = ""
    system: LongText = Field("", description="System prompt.")
    parameters: Parameters = Field({}, description="Of its requests, such as temperature.")
    models: Models = Field([], description="Models that answer, side by side.")
    leaves: Leaves = Field([], description="The last message that is shown, for each model.")


class MessageFields(Body):
    """A message, but for its id."""

    parent: Id | None = Field(None, description="The message before it in the conversation; null: it is a first one.")
    role: Literal["user", "assistant"]
    content: LongText = ""
    reasoning: LongText | None = None
    reasoning_seconds: Annotated[float, Field(ge=0)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    model: Name | None = None
    finish_reason: Annotated[str, Field(max_length=64)] | None = None
    stats: Stats | None = None
    logprobs: Logprobs | None = None
    created_at: Time | None = Field(None, description="null: now, or as it was.")

    @model_validator(mode="after")
    def _is_short(self) -> Self:
        if len(self.content.encode()) + len((self.reasoning or "").encode()) > TEXT_BYTES:
            raise ValueError(f"content: is, with reasoning, longer than {TEXT_BYTES >> 20} MiB")
        return self


class WholeMessage(MessageFields):
    """A message of an export."""

    id: Id


class WholeConversation(ConversationFields):
    """A conversation of an export."""

    id: Id | None = Field(None, description="As it was; an imported conversation gets a new one.")
    created_at: Time | None = None
    updated_at: Time | None = None
    messages: Annotated[list[WholeMessage], Field(max_length=10_000)] = Field([])


class ImportBody(Body):
    """An export, as it was written (all of it is imported, or nothing); or a Markdown file of one conversation."""

    format: Literal["danlu-conversations", "markdown"]
    version: Literal[1] = 1
    conversations: Annotated[list[WholeConversation], Field(max_length=10_000)] | None = None
    text: Text | None = Field(None, description="The Markdown.")

    @model_validator(mode="after")
    def _has_what_it_says(self) -> Self:
        needed, other = ("text", "conversations") if self.format == "markdown" else ("conversations", "text")
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: is missing")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: does not go with format {self.format!r}")
        return self


class ConversationReply(Reply):
    """A conversation without its messages."""

    id: str
    title: str
    system: str
    parameters: dict[str, Any]
    models: list[str]
    leaves: list[str]
    created_at: float = Field(description="Seconds since 1970.")
    updated_at: float = Field(description="Seconds since 1970: the newest change of its messages.")


class MessageReply(Reply):
    """A message. Those of a conversation come oldest first, so that a parent stands before what hangs below it."""

    id: str
    parent: str | None
    role: Literal["user", "assistant"]
    content: str
    reasoning: str | None
    reasoning_seconds: float | None
    tool_calls: list[ToolCall] | None
    model: str | None
    finish_reason: str | None
    stats: dict[str, float | None] | None
    logprobs: list[TokenLogprob] | None
    created_at: float


class WholeConversationReply(ConversationReply):
    """A conversation."""

    messages: list[MessageReply]


class Summary(Reply):
    """A line of the list of conversations."""

    id: str
    title: str
    models: list[str]
    created_at: float
    updated_at: float
    snippet: str | None = Field(None, description="Of a search: some text round the first hit in its messages.")


class SummaryList(Reply):
    """Conversations, newest first."""

    data: list[Summary]
    has_more: bool
    next: str | None = Field(description="`before` of the next request; null: there are no more.")


class Saved(Reply):
    """A message was saved."""

    id: str
    created_at: float
    updated_at: float = Field(description="Of the conversation.")


class Imported(Reply):
    """What was imported, under new ids."""

    data: list[Summary]


class Export(Reply):
    """Conversations in a file."""

    format: Literal["danlu-conversations"]
    version: Literal[1]
    conversations: list[WholeConversationReply]
