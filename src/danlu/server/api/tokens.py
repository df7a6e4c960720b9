"""POST /tokenize and /detokenize: text to token ids and back, as a model reads it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from danlu.server.access.limits import ParsedRoute
from danlu.server.api.chat_request import turn_of
from danlu.server.api.chat_schema import MOST_MESSAGES, MOST_TOOLS, ChatRequest, Message, Tool
from danlu.server.api.inputs import ModelName
from danlu.server.api.legacy_logprobs import token_name
from danlu.server.api.sampling_fields import TokenId
from danlu.server.api.turn import prompt_of
from danlu.server.errors import ApiError, documented
from danlu.server.protocol import ModelInfo, Prompt, TextPrompt
from danlu.server.schema import Body, JsonObject, Reply, Text
from danlu.server.serving import serving_of

router = APIRouter(route_class=ParsedRoute)


class TokenizeRequest(Body):
    """A prompt, or the messages of a chat."""

    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    prompt: Text | None = Field(None, description="A text.")
    add_special_tokens: bool | None = Field(
        None, description="With the tokens that the model has round a text. Default: true. Only with prompt."
    )
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_MESSAGES, description="A conversation.")
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS, description="Only with messages.")
    add_generation_prompt: bool | None = Field(
        None, description="With what opens the answer. Default: true. Only with messages."
    )
    continue_final_message: bool | None = Field(
        None, description="The last message is the beginning of the answer. Only with messages."
    )
    chat_template_kwargs: JsonObject | None = Field(
        None, description="Further variables for the chat template. Only with messages."
    )
    return_token_strs: bool | None = Field(None, description="Tell the text of each token too.")


class Tokens(Reply):
    """Token ids.

    Attributes:
        max_model_len: tokens that prompt and answer can have together.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(None, description="A token that is no text by itself: as ``bytes:\\xe4``.")


class DetokenizeRequest(Body):
    """Token ids."""

    model: ModelName | None = Field(None, description="The first one served, if none is named.")
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


class Detokenized(Reply):
    """The text that token ids stand for."""

    prompt: str


@router.post("/tokenize", responses=documented(404))
async def tokenize(request: Request, body: TokenizeRequest) -> Tokens:
    """Turn a text or a conversation into token ids."""
    serving = serving_of(request)
    info = await serving.info(request, body.model)
    ids = await serving.tokenize(request, info.name, _prompt(body, info))
    names = None
    if body.return_token_strs:
        names = [token_name(data) for data in await serving.token_texts(request, info.name, ids)]
    return Tokens(count=len(ids), max_model_len=info.context, tokens=ids, token_strs=names)


@router.post("/detokenize", responses=documented(404))
async def detokenize(request: Request, body: DetokenizeRequest) -> Detokenized:
    """Turn token ids into text."""
    return Detokenized(prompt=await serving_of(request).detokenize(request, body.model, body.tokens))


def _prompt(body: TokenizeRequest, info: ModelInfo) -> Prompt:
    """What is to be read: of messages, the same that a chat completion reads."""
    if (body.prompt is None) == (body.messages is None):
        raise _refused("prompt", "give a prompt or messages, one of them")
    if body.prompt is not None:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise _refused(name, "belongs to messages; leave it out")
        return TextPrompt(body.prompt, special_tokens=body.add_special_tokens is not False)
    if body.add_special_tokens is not None:
        raise _refused("add_special_tokens", "belongs to prompt; the chat template has the special tokens of a chat")
    if body.continue_final_message and body.add_generation_prompt:
        raise _refused("add_generation_prompt", "is not possible with continue_final_message; leave one out")
    fields = ("model", "messages", "tools", "continue_final_message", "chat_template_kwargs")
    asked = ChatRequest.model_construct(**{name: getattr(body, name) for name in fields})
    return dataclasses.replace(
        prompt_of(turn_of(asked), info), generation_prompt=body.add_generation_prompt is not False
    )


def _refused(field: str, reason: str) -> ApiError:
    return ApiError(400, f"{field}: {reason}", param=field, code="invalid_value")
