"""What OpenAI's Responses API answers with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from danlu.server.schema import Reply


class InputTokensDetails(Reply):
    """Of the input's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Reply):
    """Of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """What a response has cost."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Reply):
    """Why there is no answer."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Reply):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseReply(Reply):
    """A response, whole or not yet."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix seconds.")
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]] = Field(description="Items: reasoning, message, function_call.")
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class DeletedReply(Reply):
    """A response is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemListReply(Reply):
    """Items of the input of a response."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class InputTokensReply(Reply):
    """How many tokens an input has."""

    object: Literal["response.input_tokens"]
    input_tokens: int
