"""Answers while they are written, and what they cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from danlu.server.errors import ApiError
from danlu.server.models import Entry
from danlu.server.operation.drain import shutting_down
from danlu.server.operation.metrics import Metrics
from danlu.server.protocol import Piece, TokenLogprob, unpack_logprobs
from danlu.server.remote import Stream, WorkerFailed, WorkerStopped


@dataclass
class Cost:
    """Tokens of a request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Of a request, in seconds; tokens a second after the first token."""

    queued_seconds: float
    first_token_seconds: float
    total_seconds: float
    tokens_per_second: float


class Answer:
    """The answers to one prompt while they are written: iterate over it once.

    Attributes:
        id: of the request.
        model: the name of the model that answers.
        created: seconds since 1970.
        prompt_tokens: of the prompt as the model reads it.
        thinking: the prompt ends inside a thought.
        submitted_at: seconds since 1970 when the engine got it.
        finish_reasons: of the answers that have ended.

    Args:
        keep_texts: for :attr:`texts`.
    """

    def __init__(
        self, request_id: str, entry: Entry, stream: Stream, until: float, metrics: Metrics, *, keep_texts: bool = False
    ) -> None:
        self.id, self.model, self.created = request_id, entry.name, int(time.time())
        self.prompt_tokens, self.thinking = stream.prompt_tokens, stream.thinking
        self.submitted_at = time.time()
        self.finish_reasons: list[str] = []
        self._stream, self._until, self._metrics = stream, until, metrics
        self._texts: dict[int, list[str]] | None = {} if keep_texts else None
        self._told_tokens = 0
        self._last_at: dict[int, float] = {}
        self._begun_at = time.monotonic()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """
        Raises:
            ApiError: the deadline is past, or the engine failed.
        """
        pieces = aiter(self._stream)
        while True:
            try:
                async with asyncio.timeout_at(self._until):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                self._metrics.aborted(self.model, "deadline")
                raise too_late() from None
            except WorkerStopped:
                self._metrics.aborted(self.model, "drain")
                raise shutting_down() from None
            except WorkerFailed as error:
                raise ApiError(500, f"the model failed: {error}", code="model_failed") from None
            self._count(piece)
            yield piece

    def _count(self, piece: Piece) -> None:
        n, now = len(piece.token_ids), time.monotonic()
        if piece.finish_reason is not None:
            self.finish_reasons.append(piece.finish_reason)
        if self._texts is not None:
            self._texts.setdefault(piece.index, []).append(piece.text)
        if not n:
            return
        if not self._last_at:
            self._metrics.first_token(self.model, now - self._begun_at)
        elif (last := self._last_at.get(piece.index)) is not None:
            self._metrics.tokens(self.model, n, now - last)
        self._last_at[piece.index] = now
        self._told_tokens += n

    @property
    def usage(self) -> Cost:
        """What it has cost; of an answer that did not come to its end, what was told of it."""
        end = self._stream.end
        if end is None:
            return Cost(self.prompt_tokens, 0, self._told_tokens)
        return Cost(self.prompt_tokens, end["cached_tokens"], end["completion_tokens"])

    @property
    def texts(self) -> list[str] | None:
        """The answers as far as they were told; None where they were not kept."""
        return None if self._texts is None else ["".join(pieces) for _, pieces in sorted(self._texts.items())]

    @property
    def timings(self) -> Timings | None:
        """As the engine measured them, once the answer has ended."""
        end = self._stream.end
        if end is None or end["first_token_seconds"] is None:
            return None
        first, total = end["first_token_seconds"], end["total_seconds"]
        writing = total - first
        rate = (end["completion_tokens"] - 1) / writing if writing > 0 else 0.0
        return Timings(end["queued_seconds"], first, total, max(0.0, rate))

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """An entry for each token of the prompt, None for the first, once the answer has ended, if they were asked
        for."""
        end = self._stream.end or {}
        return unpack_logprobs(end["prompt_logprobs"]) if "prompt_logprobs" in end else None


def too_late() -> ApiError:
    """The deadline is past."""
    return ApiError(504, "the request took longer than the server's deadline", code="deadline_exceeded")
