"""Responses while they are written: for the client that asked, or in the background for whoever comes later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.requests import Request

from danlu.server.api.response_events import ResponseWriter
from danlu.server.api.response_store import ResponseStore
from danlu.server.api.turn import FinishReason, TurnStream
from danlu.server.errors import ApiError
from danlu.server.operation.log_format import log


class Job:
    """A response that is being written.

    Args:
        stack: holds what the answer needs; it is closed with the last event.
        store: where the response is kept; None: nowhere.

    Attributes:
        caller: the id of whom it belongs to.
        error: why it failed.
    """

    def __init__(
        self,
        caller: str,
        writer: ResponseWriter,
        stream: TurnStream,
        stack: AsyncExitStack,
        store: ResponseStore | None,
    ) -> None:
        self.caller, self.writer = caller, writer
        self.error: ApiError | None = None
        self._stream, self._stack, self._store = stream, stack, store
        self._events: list[bytes] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def response(self) -> dict[str, Any]:
        """As it stands."""
        return self.writer.response

    async def write(self) -> AsyncGenerator[bytes, None]:
        """Events, to the end. The response is kept before the event that tells of its end is sent; one that is left
        in between is kept as cancelled."""
        finish: FinishReason | None = None
        try:
            async with self._stack:
                for sent in self.writer.begin():
                    yield sent
                async for event in self._stream:
                    finish = event.finish_reason or finish
                    for sent in self.writer.push(event):
                        yield sent
            last = self.writer.finish("incomplete" if finish == "length" else "completed", self._usage())
        except ApiError as error:
            self.error = error
            last = self.writer.fail(error.message)
        except (asyncio.CancelledError, GeneratorExit):
            self.writer.cancel()
            await self._keep(None)
            raise
        await self._keep(last)
        for sent in last:
            yield sent

    def run(self) -> asyncio.Task[None]:
        """Write in the background."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._tell())
        return self._task

    async def cancel(self) -> None:
        """End what runs in the background."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """The events of what runs in the background, from the one whose number is ``after`` + 1."""
        assert self._task is not None
        place = after + 1
        while place < len(self._events) or not self._task.done():
            if place < len(self._events):
                yield self._events[place]
                place += 1
            else:
                await self._news.wait()

    async def _run(self) -> None:
        async with aclosing(self.write()) as events:
            async for event in events:
                self._events.append(event)
                self._tell()

    def _tell(self) -> None:
        """Wake those who follow."""
        self._news.set()
        self._news = asyncio.Event()

    async def _keep(self, last: list[bytes] | None) -> None:
        if self._store is None:
            return
        events = None if self._task is None else self._events + (last or [])
        await self._store.put(self.response, events)

    def _usage(self) -> dict[str, Any]:
        used = self._stream.answer.usage
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._stream.reasoning_tokens},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }


class Jobs:
    """The responses of a server that are being written, by their ids."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, caller: str, response_id: str) -> Job | None:
        """One of the caller's that is being written."""
        job = self._jobs.get(response_id)
        return job if job is not None and job.caller == caller else None

    async def write(self, job: Job) -> AsyncGenerator[bytes, None]:
        """Its events, for the client that asked."""
        self._jobs[job.response["id"]] = job
        try:
            async with aclosing(job.write()) as events:
                async for event in events:
                    yield event
        finally:
            del self._jobs[job.response["id"]]

    async def whole(self, job: Job) -> dict[str, Any]:
        """The response, written to its end, for the client that asked.

        Raises:
            ApiError: it failed.
        """
        async with aclosing(self.write(job)) as events:
            async for _ in events:
                pass
        if job.error is not None:
            raise job.error
        return job.response

    def run(self, job: Job) -> None:
        """Write one in the background."""
        self._jobs[job.response["id"]] = job
        task = job.run()
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._ended(job, task))

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        del self._jobs[job.response["id"]]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s: %s", job.response["id"], type(error).__name__, error)

    async def close(self) -> None:
        """Wait for what runs in the background; it fails by itself once the models are gone."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __len__(self) -> int:
        """How many run in the background."""
        return len(self._tasks)


def jobs_of(request: Request) -> Jobs:
    """The responses that the server writes now."""
    jobs: Jobs = request.app.state.response_jobs
    return jobs
