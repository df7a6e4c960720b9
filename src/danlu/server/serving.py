"""What every route does with a model: who may, whether there is room, what it cost, and when it ends."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.server.access.database import Database
from danlu.server.access.keys import Admission, Keys, caller_of
from danlu.server.access.sessions import Sessions
from danlu.server.answer import Answer, Cost, too_late
from danlu.server.config import ServeConfig
from danlu.server.errors import ApiError, from_user_error
from danlu.server.models import Entry, Models
from danlu.server.operation.drain import shutting_down
from danlu.server.operation.metrics import Metrics
from danlu.server.protocol import (
    ChatPrompt,
    Kind,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenLogprob,
    pack_params,
    pack_prompt,
    unpack_logprobs,
)
from danlu.server.remote import WorkerFailed, WorkerStopped

AS_MANY_AS_FIT = 1 << 24
"""`max_new_tokens` of a request that sets no limit: the answer may fill the context."""

RESERVED_TOKENS = 4096
"""What an answer without a limit may take of those of its key, at most; it gets what is left of them."""


@dataclass(frozen=True)
class Embedded:
    """Vectors of length 1, as 32-bit floats with the lowest byte first, and what they cost."""

    model: str
    vectors: list[bytes]
    prompt_tokens: int


@dataclass(frozen=True)
class Scored:
    """Scores of pairs of texts, the better the higher, and what they cost."""

    model: str
    scores: list[float]
    prompt_tokens: int


class Serving:
    """All that the routes share."""

    def __init__(self, config: ServeConfig, models: Models, database: Database, keys: Keys, metrics: Metrics) -> None:
        self.config, self.models, self.database = config, models, database
        self.keys, self.usage, self.metrics = keys, keys.usage, metrics
        self.sessions = Sessions(database)

    async def info(self, request: Request, model: str | None) -> ModelInfo:
        """A model, loaded if it was not.

        Raises:
            ApiError: there is none of the name, or not for this key, or it cannot be loaded.
        """
        entry = self.entry(request, model)
        async with self.models.use(entry) as remote:
            return remote.infos[entry.adapter]

    def entry(self, request: Request, model: str | None) -> Entry:
        """A model that the key may use.

        Raises:
            ApiError: there is none of the name, or not for this key.
        """
        caller = caller_of(request)
        if model is None and caller.models is not None:
            model = next(filter(caller.may_use, self.models.entries), None)
        if caller.models is not None and (model is None or not caller.may_use(model)):
            raise ApiError(404, f"model: there is no model {model!r} for this key; GET /v1/models lists them",
                           param="model", code="model_not_found")  # fmt: skip
        return self.models.entry(model)

    @contextlib.asynccontextmanager
    async def generate(
        self,
        request: Request,
        model: str | None,
        prompt: Prompt,
        params: SamplingParams,
        *,
        names: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Answer]:
        """Have a prompt answered. Who leaves the block aborts what still runs.

        Args:
            model: None: the first one.
            params: with `max_new_tokens` of AS_MANY_AS_FIT, answers may fill the context.
            names: options of the engine -> fields of the request, for messages.

        Raises:
            ApiError: it cannot be answered, or not now.
        """
        entry = self.entry(request, model)
        request.state.params, request.state.prompt = params, pack_prompt(prompt)
        n = max(params.best_of or params.n, params.beams)
        limited = params.max_new_tokens < AS_MANY_AS_FIT
        about = _about(prompt)
        tokens = about + n * (params.max_new_tokens if limited else RESERVED_TOKENS)
        least = tokens if limited else about + n
        until = asyncio.get_running_loop().time() + self.config.deadline
        async with (
            self._admitted(request, entry, n, tokens, least) as (cost, granted),
            self.models.use(entry) as remote,
        ):
            if not limited and granted < tokens:
                params = replace(params, max_new_tokens=(granted - about) // n)
            info = remote.infos[entry.adapter]
            self._require("generate", info)
            self._require_room(params, info, names or {})
            async with contextlib.AsyncExitStack() as running:
                with _refusals(names):
                    stream = await running.enter_async_context(remote.generate(prompt, params, entry.adapter))
                answer = Answer(
                    request.state.request_id, entry, stream, until, self.metrics, keep_texts=self.config.log_prompts
                )
                request.state.answer = answer
                try:
                    yield answer
                finally:
                    used = answer.usage
                    cost.prompt_tokens, cost.cached_tokens = used.prompt_tokens, used.cached_tokens
                    cost.completion_tokens = used.completion_tokens

    async def score_tokens(
        self,
        request: Request,
        model: str | None,
        prompt: Prompt,
        top: int = 0,
        *,
        names: Mapping[str, str] | None = None,
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """A prompt's tokens and their log probabilities, None for the first, with the ``top`` most likely in place of
        each."""
        params = pack_params(SamplingParams(prompt_logprobs=top))
        packed = {"prompt": pack_prompt(prompt), "params": params}
        found = await self._ask(request, model, "score", "generate", _about(prompt), packed, names)
        return found["ids"], unpack_logprobs(found["logprobs"])

    async def tokenize(self, request: Request, model: str | None, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as a model reads it."""
        ids: list[int] = await self._look_up(request, model, "tokenize", prompt=pack_prompt(prompt))
        return ids

    async def detokenize(
        self, request: Request, model: str | None, ids: Sequence[int], *, names: Mapping[str, str] | None = None
    ) -> str:
        """Text of token ids, which errors call ``tokens``."""
        text: str = await self._look_up(request, model, "detokenize", names, ids=list(ids))
        return text

    async def token_texts(self, request: Request, model: str | None, ids: Sequence[int]) -> list[bytes]:
        """Text of each token."""
        return [text.encode("latin-1") for text in await self._look_up(request, model, "texts", ids=list(ids))]

    async def embed(
        self,
        request: Request,
        model: str | None,
        inputs: Sequence[str | list[int]],
        *,
        dimensions: int | None = None,
        truncate: int | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Embedded:
        """Vectors of texts, of length 1.

        Args:
            dimensions: keep the first ones only.
            truncate: read so many tokens of each; -1: as many as the model can. None: longer texts are refused.
            names: of the inputs (input.0, input.1, ...) in errors.
        """
        info = await self.info(request, model)
        if info.kind == "rank":
            raise ApiError(400, f"model: {info.name!r} compares texts and embeds none; name another", param="model")
        if dimensions is not None and dimensions > info.dim:
            raise ApiError(
                400, f"dimensions: the model's vectors have {info.dim}", param="dimensions", code="invalid_value"
            )
        reserve = sum(_length(one) for one in inputs)
        packed = {"inputs": list(inputs), "dimensions": dimensions, "truncate": truncate}
        found = await self._ask(request, model, "embed", info.kind, reserve, packed, _TRUNCATED | dict(names or {}))
        return Embedded(info.name, [base64.b64decode(vector) for vector in found["vectors"]], found["prompt_tokens"])

    async def similarity(
        self,
        request: Request,
        model: str | None,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate: int | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Scored:
        """How well the texts of each pair go together: a cross-encoder's score, or the cosine of embeddings.

        Args:
            truncate: as of :meth:`embed`.
            names: of the pairs (pair.0, pair.1, ...) in errors.
        """
        info = await self.info(request, model)
        reserve = sum(_length(one) + _length(other) for one, other in pairs)
        packed = {"pairs": [list(pair) for pair in pairs], "truncate": truncate}
        found = await self._ask(request, model, "rank", info.kind, reserve, packed, _TRUNCATED | dict(names or {}))
        return Scored(info.name, found["scores"], found["prompt_tokens"])

    # ---------------------------------------------------------------------------------------------- underneath

    async def _look_up(
        self, request: Request, model: str | None, op: str, names: Mapping[str, str] | None = None, **packed: Any
    ) -> Any:
        """Ask a model's tokenizer."""
        entry = self.entry(request, model)
        async with self.models.use(entry) as remote:
            with _refusals(names):
                return await remote.ask(op, adapter=entry.adapter, **packed)

    async def _ask(
        self,
        request: Request,
        model: str | None,
        op: str,
        kind: Kind,
        reserve: int,
        packed: dict[str, Any],
        names: Mapping[str, str] | None,
    ) -> Any:
        """Ask for work on prompts alone."""
        entry = self.entry(request, model)
        async with self._admitted(request, entry, 1, reserve, reserve) as (cost, _), self.models.use(entry) as remote:
            self._require(kind, remote.infos[entry.adapter])
            try:
                with _refusals(names):
                    async with asyncio.timeout(self.config.deadline):
                        found = await remote.ask(op, adapter=entry.adapter, **packed)
            except TimeoutError:
                self.metrics.aborted(entry.name, "deadline")
                raise too_late() from None
            cost.prompt_tokens = found["prompt_tokens"]
            return found

    @contextlib.asynccontextmanager
    async def _admitted(
        self, request: Request, entry: Entry, n: int, tokens: int, least: int
    ) -> AsyncIterator[tuple[Cost, int]]:
        """A place in the model's queue and in the key's limits; what was used is recorded in the end.

        Args:
            n: answers.
            tokens: that prompt and answers may take; what is granted may be fewer, but not fewer than ``least``.
        """
        caller, route, begun = caller_of(request), _route(request), time.monotonic()
        request.state.model = entry.name
        admission: Admission = await self.keys.admit(caller, tokens, least=least)
        cost, status = Cost(), 200
        self.metrics.request_begun(entry.name, route)
        try:
            owner = entry.owner  # whose engine writes them
            if owner.answers + n > self.config.max_running + self.config.max_queue:
                raise ApiError(
                    429, f"{owner.answers} answers are running or waiting, all that this server takes; try again",
                    code="queue_full", headers={"Retry-After": str(_retry_after(owner))},
                )  # fmt: skip
            owner.answers += n
            try:
                yield cost, admission.tokens
            finally:
                owner.answers -= n
        except ApiError as error:
            status = error.status
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = 499
            self.metrics.aborted(entry.name, "disconnect")
            raise
        except BaseException:
            status = 500
            raise
        finally:
            seconds = time.monotonic() - begun
            request.state.cost = cost
            self.keys.settle(admission, cost.prompt_tokens + cost.completion_tokens)
            self.metrics.request_ended(entry.name, route, status, cost, seconds)
            if cost.prompt_tokens:
                await self.usage.record(
                    caller,
                    model=entry.name,
                    route=route,
                    request_id=request.state.request_id,
                    prompt_tokens=cost.prompt_tokens,
                    cached_tokens=cost.cached_tokens,
                    completion_tokens=cost.completion_tokens,
                    status=status,
                    seconds=seconds,
                )

    @staticmethod
    def _require(kind: Kind, info: ModelInfo) -> None:
        if info.kind != kind:
            raise ApiError(
                400, f"model: {info.name!r} {_DOES[info.kind]}; name another", param="model", code="wrong_model"
            )

    @staticmethod
    def _require_room(params: SamplingParams, info: ModelInfo, names: Mapping[str, str]) -> None:
        if info.context < params.max_new_tokens != AS_MANY_AS_FIT:
            field = names.get("max_new_tokens", "max_new_tokens")
            raise ApiError(400, f"{field}: {params.max_new_tokens} is more than the model's context of {info.context} "
                           "tokens; ask for less", param=field, code="invalid_value")  # fmt: skip


_TRUNCATED = {"max_length": "truncate_prompt_tokens"}
_DOES = {"generate": "writes texts", "embed": "embeds texts and writes none", "rank": "compares texts and writes none"}


def serving_of(request: Request) -> Serving:
    """The server that got a request."""
    serving: Serving = request.app.state.serving
    return serving


@contextlib.contextmanager
def _refusals(names: Mapping[str, str] | None) -> Any:
    """What a worker says against a request, as an answer to the client."""
    try:
        yield
    except DanluError as error:
        raise from_user_error(error, names) from None
    except WorkerStopped:
        raise shutting_down() from None
    except WorkerFailed as error:
        raise ApiError(500, f"the model failed: {error}", code="model_failed") from None


def _route(request: Request) -> str:
    """The route's template, as metrics name it."""
    return getattr(request.scope.get("route"), "path", request.url.path)


def _about(prompt: Prompt) -> int:
    """Tokens of a prompt, guessed: it is admitted before it is read."""
    if isinstance(prompt, ChatPrompt):
        return sum(_length(str(message.get("content") or "")) for message in prompt.messages)
    return _length(prompt.text if isinstance(prompt, TextPrompt) else prompt.ids)


def _length(text: str | Sequence[int]) -> int:
    return len(text) // 4 + 1 if isinstance(text, str) else len(text)


def _retry_after(entry: Entry) -> int:
    """Seconds after which a place may be free: more, the longer the queue."""
    return min(30, 1 + entry.answers // 64)
