"""POST /v1/completions: prompts that are continued as they are, or gaps that are filled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.engine.config import MOST_SEQUENCES
from danlu.server.access.limits import ParsedRoute
from danlu.server.answer import Answer, Cost
from danlu.server.api.completion_schema import Completion, CompletionRequest, params_of, prompts_of, refused
from danlu.server.api.legacy_logprobs import LegacyLogprobs, joined
from danlu.server.api.sampling_fields import NAMES
from danlu.server.errors import ApiError, documented
from danlu.server.protocol import FinishReason, Piece, TextPrompt, TokenLogprob, TokenPrompt
from danlu.server.serving import Serving, serving_of
from danlu.server.streaming import DOCUMENTED, EventStream, sse, until_disconnect

router = APIRouter(route_class=ParsedRoute)


@dataclass
class Asked:
    """A prompt on its way to its answers.

    Attributes:
        where: the field that holds it.
        echo: its text, if that is given back.
        first_token: of the prompt, if its log probabilities are given back too.
    """

    where: str
    prompt: TextPrompt | TokenPrompt
    echo: str = ""
    first_token: bytes = b""

    def logprobs(self, found: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any]]:
        """Entries of its tokens; nothing where they were not asked for."""
        if found is None:
            return []
        tokens = [(self.first_token if one is None else one.text, one) for one in found]
        return [LegacyLogprobs().add(tokens, self.echo)]


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={200: {"content": DOCUMENTED}, **documented(404, 504)},
)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continue texts."""
    work = Work(serving_of(request), request, body)
    if not body.stream:
        return JSONResponse(await until_disconnect(request, work.whole()))
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        # Log probabilities of a prompt are known when its answers have ended, so there is nothing to tell before that.
        return EventStream(work.told_at_once(await until_disconnect(request, work.whole())))
    return EventStream(await work.streamed())


class Work:
    """One request on its way to its answers.

    Raises:
        ApiError: fields contradict each other.
    """

    def __init__(self, serving: Serving, request: Request, body: CompletionRequest) -> None:
        self.serving, self.request, self.body = serving, request, body
        self.n = body.n or 1
        self.prompts = prompts_of(body)
        self.params = params_of(body)
        self.tells_usage = body.stream_options is not None and body.stream_options.include_usage is True
        if (count := len(self.prompts) * (self.params.best_of or self.n)) > MOST_SEQUENCES:
            raise refused("prompt", f"{count} answers are asked for; one request may have {MOST_SEQUENCES}")

    async def whole(self) -> dict[str, Any]:
        """The response as JSON."""
        asked = [await self._asked(*one) for one in self.prompts]
        if self.body.max_tokens == 0:
            return await self._echoed(asked)
        choices: list[dict[str, Any]] = []
        async with contextlib.AsyncExitStack() as stack:
            answers = await self._open(stack, asked)
            for one, answer in zip(asked, answers, strict=True):
                pieces: list[list[Piece]] = [[] for _ in range(self.n)]
                async for piece in answer:
                    pieces[piece.index].append(piece)
                before = one.logprobs(answer.prompt_logprobs)
                choices += [_choice(len(choices) + i, one.echo, before, told) for i, told in enumerate(pieces)]
            return _head(answers[0]) | {"choices": choices, "usage": _usage([answer.usage for answer in answers])}

    async def _echoed(self, asked: Sequence[Asked]) -> dict[str, Any]:
        """The response where nothing is to be written."""
        info = await self.serving.info(self.request, self.body.model)
        n_tokens = 0
        choices: list[dict[str, Any]] = []
        for one in asked:
            before, ids = [], None
            if self.body.logprobs is not None:
                ids, found = await self.serving.score_tokens(
                    self.request, info.name, one.prompt, self.body.logprobs, names=_names(one.where)
                )
                before = one.logprobs(found)
            else:
                ids = await self.serving.tokenize(self.request, info.name, one.prompt)
            n_tokens += len(ids)
            end = [Piece(0, "", [], None if not before else [], "length")]
            choices += [_choice(len(choices) + i, one.echo, before, end) for i in range(self.n)]
        head = {"id": _id(self.request.state.request_id), "object": "text_completion", "created": int(time.time())}
        return head | {"model": info.name, "choices": choices, "usage": _usage([Cost(n_tokens)])}

    async def streamed(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, once it is certain that all prompts can be answered."""
        asked = [await self._asked(*one) for one in self.prompts]
        stack = contextlib.AsyncExitStack()
        try:
            events = self._events(stack, asked, await self._open(stack, asked))
            await anext(events)  # from here on, closing the events closes the stack
        except BaseException:
            await stack.aclose()
            raise
        return events

    async def told_at_once(self, response: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """A whole response as server-sent events."""
        choices, usage = response.pop("choices"), response.pop("usage")
        for choice in choices:
            yield self._chunk(response, choice)
        for event in self._end(response, usage):
            yield event

    async def _events(
        self, stack: contextlib.AsyncExitStack, asked: Sequence[Asked], answers: Sequence[Answer]
    ) -> AsyncGenerator[bytes, None]:
        head = _head(answers[0])
        ahead = bool(self.params.stop)
        writers = [LegacyLogprobs(len(one.echo), ahead=ahead) for one in asked for _ in range(self.n)]
        async with stack:
            yield b""
            try:
                if self.body.echo:
                    for index in range(len(writers)):
                        yield self._chunk(head, _part(index, asked[index // self.n].echo))
                async for number, piece in interleaved(answers):
                    if piece.finish_reason == "error":
                        continue  # its reason comes as an exception, when all answers to the prompt have ended
                    index = number * self.n + piece.index
                    logprobs = None if piece.logprobs is None else writers[index].add(_named(piece), piece.text)
                    if piece.text or piece.logprobs or piece.finish_reason:
                        yield self._chunk(head, _part(index, piece.text, logprobs, piece.finish_reason))
            except ApiError as error:
                yield sse(error.body())
                return
        for event in self._end(head, _usage([answer.usage for answer in answers])):
            yield event  # clients hang up on [DONE]: the stack is closed by then

    def _chunk(self, head: dict[str, Any], choice: dict[str, Any]) -> bytes:
        return sse({**head, "choices": [choice], "usage": None} if self.tells_usage else {**head, "choices": [choice]})

    def _end(self, head: dict[str, Any], usage: dict[str, Any]) -> list[bytes]:
        return [*([sse({**head, "choices": [], "usage": usage})] if self.tells_usage else []), sse("[DONE]")]

    async def _open(self, stack: contextlib.AsyncExitStack, asked: Sequence[Asked]) -> list[Answer]:
        return [
            await stack.enter_async_context(
                self.serving.generate(self.request, self.body.model, one.prompt, self.params, names=_names(one.where))
            )
            for one in asked
        ]

    async def _asked(self, where: str, prompt: TextPrompt | TokenPrompt) -> Asked:
        """A prompt with what is given back of it."""
        if not self.body.echo:
            return Asked(where, prompt)
        request, model = self.request, self.body.model
        if isinstance(prompt, TextPrompt):
            text = prompt.text
        else:
            text = await self.serving.detokenize(request, model, prompt.ids, names={"tokens": where})
        if self.body.logprobs is None:
            return Asked(where, prompt, text)
        ids = await self.serving.tokenize(request, model, prompt)
        (first,) = await self.serving.token_texts(request, model, ids[:1])
        return Asked(where, TokenPrompt(ids), text, first)


async def interleaved(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, with the number of the answer."""
    if len(answers) == 1:
        async for piece in answers[0]:
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def read(number: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                queue.put_nowait((number, piece))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(number, answer)) for number, answer in enumerate(answers)]
    try:
        n_open = len(tasks)
        while n_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _names(where: str) -> dict[str, str]:
    return {**NAMES, "prompt": where, "prompt_logprobs": "logprobs"}


def _head(answer: Answer) -> dict[str, Any]:
    return {"id": _id(answer.id), "object": "text_completion", "created": answer.created, "model": answer.model}


def _id(request_id: str) -> str:
    return f"cmpl-{request_id}"


def _choice(index: int, echo: str, before: list[dict[str, Any]], pieces: Sequence[Piece]) -> dict[str, Any]:
    """A whole answer."""
    text = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in _named(piece)]
    asked = any(piece.logprobs is not None for piece in pieces)
    logprobs = joined([*before, LegacyLogprobs(len(echo)).add(tokens, text)]) if asked else None
    return _part(index, echo + text, logprobs, pieces[-1].finish_reason)


def _part(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: FinishReason | None = None
) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def _named(piece: Piece) -> list[tuple[bytes, TokenLogprob | None]]:
    return [(one.text, one) for one in piece.logprobs or ()]


def _usage(costs: Sequence[Cost]) -> dict[str, Any]:
    prompt_tokens, completion_tokens = (
        sum(getattr(cost, name) for cost in costs) for name in ("prompt_tokens", "completion_tokens")
    )
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cost.cached_tokens for cost in costs)},
    }
