"""A model in a process of its own, as the server's event loop sees it (see protocol.py and worker/)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from danlu import config as configs
from danlu.engine.config import SamplingParams
from danlu.engine.engine_config import EngineConfig
from danlu.errors import DanluError
from danlu.server.operation.log_format import log
from danlu.server.protocol import (
    HEADER,
    LONGEST,
    ModelInfo,
    Piece,
    Prompt,
    TokenLogprob,
    pack,
    pack_params,
    pack_prompt,
    unpack_logprobs,
)

STOP_SECONDS = 2.0
"""A process that does not end by itself within this time is killed."""


class WorkerFailed(Exception):
    """The process of a model made a mistake, or is gone."""


class WorkerStopped(WorkerFailed):
    """The server has ended the process of a model: it ends itself."""


class Stream:
    """The pieces of one request's answers, as they come.

    Attributes:
        prompt_tokens: of the prompt as the model reads it.
        thinking: the prompt ends inside a thought.
        end: what the request has cost, once the last piece was taken: cached_tokens, completion_tokens, queued_seconds,
            first_token_seconds, total_seconds, error, prompt_logprobs.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.thinking = False
        self.end: dict[str, Any] | None = None
        self._queue: asyncio.Queue[list[Any] | WorkerFailed] = asyncio.Queue()

    def put(self, item: list[Any] | WorkerFailed) -> None:
        """A piece has come, or will never."""
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self.end is None:
            item = await self._queue.get()
            if isinstance(item, WorkerFailed):
                raise item
            _, index, text, token_ids, logprobs, finish_reason, stop_text, self.end = item
            if self.end is not None and self.end["error"] is not None:
                raise WorkerFailed(self.end["error"])
            told: list[TokenLogprob] | None = logprobs and [one for one in unpack_logprobs(logprobs) if one is not None]
            yield Piece(index, text, token_ids, told, finish_reason, stop_text)


class RemoteModel:
    """A running process. Start one with :meth:`start`.

    Attributes:
        info: what it serves.
        infos: the same under None, and what the adapters are that it has loaded, by name.
        stats: of its engine, as they were told last.
        on_exit: called once when the process is gone, asked to or not.
    """

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: Any) -> None:
        self.info: ModelInfo
        self.infos: dict[str | None, ModelInfo] = {}
        self.stats: Mapping[str, float] = {}
        self.on_exit: Callable[[], None] = lambda: None
        self.on_stats: Callable[[Mapping[str, float]], None] = lambda stats: None
        self._process, self._reader, self._writer = process, reader, writer
        self._last_id = 0
        self._results: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, Stream] = {}
        self._adapters: dict[str, asyncio.Task[None]] = {}  # those that are loaded, or just being so
        self._gone = self._stopping = False
        self._listening: asyncio.Task[None]

    @classmethod
    async def start(cls, name: str, source: str, config: EngineConfig) -> RemoteModel:
        """Start a process and wait until it has loaded the model.

        Raises:
            DanluError: the model cannot be loaded.
        """
        options = configs.to_dict(config)
        options = {key: value for key, value in options.items() if key in EngineConfig.__dataclass_fields__}
        here, there = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "danlu.server.worker", str(there.fileno()), name, source, json.dumps(options),
                pass_fds=(there.fileno(),), stdin=asyncio.subprocess.DEVNULL, process_group=0,  # no Ctrl-C of ours
            )  # fmt: skip
        finally:
            there.close()
        reader, writer = await asyncio.open_connection(sock=here, limit=1 << 20)
        model = cls(process, reader, writer)
        loaded = model._expect(0)
        model._listening = asyncio.create_task(model._listen())
        try:
            model.info = model.infos[None] = ModelInfo(**await loaded)
        except BaseException as error:
            await asyncio.shield(model.stop())
            if isinstance(error, WorkerFailed):
                raise DanluError(f"{name}: the process that loads the model ended ({error})") from None
            raise
        return model

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._gone

    async def ask(self, op: str, **message: Any) -> Any:
        """Ask for something that has one answer.

        Raises:
            DanluError: it cannot be done.
            WorkerFailed: it should have been.
        """
        number = self._next()
        future = self._expect(number)
        self._send({"id": number, "op": op, **message})
        try:
            return await future
        except asyncio.CancelledError:
            self._send({"id": 0, "op": "abort", "of": number})
            raise
        finally:
            self._results.pop(number, None)

    async def load_adapter(self, name: str, folder: str) -> None:
        """Have the process load an adapter, unless it has; later calls wait for the same load. One that failed is tried
        again by the next.

        Raises:
            DanluError: it cannot be loaded.
        """
        if name not in self._adapters:
            self._adapters[name] = task = asyncio.create_task(self._load_adapter(name, folder))
            task.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # somebody may have stopped to wait
        await asyncio.shield(self._adapters[name])

    async def _load_adapter(self, name: str, folder: str) -> None:
        try:
            self.infos[name] = ModelInfo(**await self.ask("load_adapter", adapter=name, folder=folder))
        except BaseException:
            del self._adapters[name]
            raise

    @contextlib.asynccontextmanager
    async def generate(
        self, prompt: Prompt, params: SamplingParams, adapter: str | None = None
    ) -> AsyncIterator[Stream]:
        """Ask for answers, of the model or of an adapter that is loaded. Who leaves the block aborts what still runs.

        Raises:
            DanluError: this can never run.
        """
        number = self._next()
        future, stream = self._expect(number), Stream()
        self._streams[number] = stream
        packed = {"prompt": pack_prompt(prompt), "params": pack_params(params), "adapter": adapter}
        self._send({"id": number, "op": "generate", **packed})
        try:
            begun = await future
            stream.prompt_tokens, stream.thinking = begun["prompt_tokens"], begun["thinking"]
            yield stream
        finally:
            if future.cancelled():  # it may begin yet
                self._results[number] = late = asyncio.get_running_loop().create_future()
                late.add_done_callback(lambda late: self._forget(number, late))
            else:
                self._forget(number)

    def _forget(self, number: int, late: asyncio.Future[Any] | None = None) -> None:
        """Nobody listens to this request any more."""
        if late is not None:
            late.exception()  # nobody minds
        self._results.pop(number, None)
        stream = self._streams.pop(number)
        if stream.end is None:
            self._send({"id": 0, "op": "abort", "of": number})

    async def stop(self) -> None:
        """End the process; returns when it is gone."""
        self._stopping = True
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._listening

    def _next(self) -> int:
        if self._gone:
            raise WorkerFailed("its process has ended")
        self._last_id += 1
        return self._last_id

    def _expect(self, number: int) -> asyncio.Future[Any]:
        self._results[number] = future = asyncio.get_running_loop().create_future()
        return future

    def _send(self, message: dict[str, Any]) -> None:
        if not self._gone:
            self._writer.write(pack(message))

    async def _listen(self) -> None:
        """Hand out what the process says, until it is gone."""
        try:
            while True:
                (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                if length > LONGEST:
                    raise ValueError(f"a message of {length} bytes")
                self._hand_out(json.loads(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except Exception as error:  # a message that cannot be understood: nothing behind it can
            log.error("process %d: %s: %s", self._process.pid, type(error).__name__, error)
        self._gone = True
        self._writer.close()
        gone = (WorkerStopped if self._stopping else WorkerFailed)("its process has ended")
        for future in list(self._results.values()):
            if not future.done():
                future.set_exception(gone)
                future.exception()  # somebody may have stopped to wait
        for stream in self._streams.values():
            stream.put(gone)
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None and not await self._ends():
                self._process.kill()
        await self._process.wait()
        self.on_exit()

    async def _ends(self) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            return False
        return True

    def _hand_out(self, message: dict[str, Any]) -> None:
        if "stats" in message:
            self.stats = message["stats"]
            self.on_stats(self.stats)
        for piece in message.get("pieces", ()):
            if (stream := self._streams.get(piece[0])) is not None:
                stream.put(piece)
        if "id" not in message:
            return
        future = self._results.pop(message["id"], None)
        if future is None or future.done():
            return
        if "result" in message:
            future.set_result(message["result"])
        else:
            future.set_exception((DanluError if message["user"] else WorkerFailed)(message["error"]))
