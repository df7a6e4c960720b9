"""The models of a server: loaded when they are asked for, unloaded for others when memory runs short."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Literal

from danlu.errors import DanluError
from danlu.hub.pull import model_path
from danlu.server.config import ServeConfig, named_adapters, named_models
from danlu.server.errors import ApiError
from danlu.server.operation.drain import shutting_down
from danlu.server.operation.log_format import log
from danlu.server.operation.metrics import Metrics
from danlu.server.protocol import ModelInfo
from danlu.server.remote import RemoteModel, WorkerFailed, WorkerStopped

State = Literal["unloaded", "loading", "loaded"]

MODEL_MEMORY_SHARE = 0.8
RETRY_FAILED_SECONDS = 10.0
"""A model that could not be loaded is not tried again sooner."""


class Entry:
    """One model, loaded or not; or an adapter, which is computed by the process of its model.

    Attributes:
        parent: the model of an adapter.
        answers: that are written or wait, of all requests.
        using: requests that hold it; it is not unloaded meanwhile.
    """

    def __init__(self, name: str, source: str, parent: Entry | None = None) -> None:
        self.name, self.source, self.parent = name, source, parent
        self.created = int(time.time())
        self.model: RemoteModel | None = None
        self.loading: asyncio.Task[RemoteModel] | None = None
        self.answers = self.using = 0
        self.used_at = 0.0
        self.failure: tuple[float, DanluError] | None = None

    @property
    def owner(self) -> Entry:
        """The entry whose process computes it."""
        return self if self.parent is None else self.parent

    @property
    def adapter(self) -> str | None:
        """Its name in the process, of an adapter."""
        return None if self.parent is None else self.name

    @property
    def info(self) -> ModelInfo | None:
        """What is known of it; None where it is not loaded."""
        model = self.owner.model
        return None if model is None else model.infos.get(self.adapter)

    @property
    def state(self) -> State:
        """Where it is."""
        if self.parent is not None:
            return "unloaded" if self.info is None else "loaded"
        return "loaded" if self.model is not None else "loading" if self.loading is not None else "unloaded"

    @property
    def memory(self) -> int:
        """Bytes that its process holds."""
        return 0 if self.model is None else resident_bytes(self.model.pid)


class Models:
    """All models of a server by the names that clients use."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.entries = {name: Entry(name, source) for name, source in named_models(config.model).items()}
        for adapter in named_adapters(config):
            self.entries[adapter.name] = Entry(adapter.name, adapter.folder, self.entries[adapter.parent])
        for name, entry in self.entries.items():
            if entry.parent is None:
                metrics.watch_memory(name, partial(getattr, entry, "memory"))
        self.budget = (config.model_memory << 20) if config.model_memory else int(MODEL_MEMORY_SHARE * machine_bytes())
        self._room = asyncio.Lock()
        self._closed = False

    @property
    def first(self) -> Entry:
        """The model that is taken where none is named."""
        return next(iter(self.entries.values()))

    def entry(self, name: str | None) -> Entry:
        """A model by its name.

        Raises:
            ApiError: there is none.
        """
        if name is None:
            return self.first
        if name not in self.entries:
            model, _, adapter = name.rpartition(":")
            if model in self.entries:
                raise ApiError(404, f"model: {model!r} has no adapter {adapter!r}; GET /v1/models lists them",
                               param="model", code="model_not_found")  # fmt: skip
            raise ApiError(404, f"model: there is no model {name!r}; GET /v1/models lists them", param="model",
                           code="model_not_found")  # fmt: skip
        return self.entries[name]

    @contextlib.asynccontextmanager
    async def use(self, entry: Entry) -> AsyncIterator[RemoteModel]:
        """The model, loaded, with the adapter if it is one, and kept so while the block lasts.

        Raises:
            ApiError: it cannot be loaded, or there is no room for it now.
        """
        if entry.parent is not None:
            async with self.use(entry.parent) as base:
                await _load_adapter(base, entry)
                yield base
            return
        if self._closed:
            raise shutting_down()
        entry.using += 1
        try:
            model = entry.model
            if model is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._load(entry))
                try:
                    model = await asyncio.shield(entry.loading)
                except asyncio.CancelledError:
                    if self._closed:
                        raise shutting_down() from None
                    raise
                except DanluError as error:
                    raise ApiError(
                        503, f"model: {entry.name!r} cannot be loaded: {error}", code="model_not_loaded"
                    ) from None
            yield model
        finally:
            entry.using -= 1
            entry.used_at = time.monotonic()

    async def preload(self) -> None:
        """Load the first model.

        Raises:
            DanluError: it cannot be loaded.
        """
        entry = self.first
        if entry.model is None:
            entry.loading = entry.loading or asyncio.create_task(self._load(entry))
            await asyncio.shield(entry.loading)

    async def close(self) -> None:
        """End all processes."""
        self._closed = True
        for entry in self.entries.values():
            if entry.loading is not None:
                entry.loading.cancel()
                await asyncio.gather(entry.loading, return_exceptions=True)
        await asyncio.gather(*(self._unload(entry) for entry in self.entries.values()))

    async def _load(self, entry: Entry) -> RemoteModel:
        try:
            if entry.failure is not None and time.monotonic() - entry.failure[0] < RETRY_FAILED_SECONDS:
                raise entry.failure[1]
            async with self._room:
                path = await _fetched(entry.source)
                await self._make_room(entry, weight_bytes(path))
                begun = time.monotonic()
                model = await RemoteModel.start(entry.name, str(path), self.config)
                model.on_exit = lambda: self._exited(entry, model)
                model.on_stats = lambda stats: self.metrics.engine(entry.name, stats)
                entry.model, entry.failure = model, None
            self.metrics.loaded(entry.name)
            what = model.info.kernels or model.info.kind
            log.info("%s: loaded in %.1f s (%s)", entry.name, time.monotonic() - begun, what)
            return model
        except DanluError as error:
            if entry.failure is None or entry.failure[1] is not error:
                entry.failure = (time.monotonic(), error)
            raise
        finally:
            entry.loading = None

    async def _make_room(self, entry: Entry, needed: int) -> None:
        """Unload what was not used for longest until there is room."""
        others = [other for other in self.entries.values() if other.model is not None]
        if needed > self.budget:
            raise ApiError(503, f"model: {entry.name!r} needs {needed >> 20} MiB, more than model_memory "
                           f"({self.budget >> 20} MiB)", param="model", code="model_too_large")  # fmt: skip
        while others and sum(other.memory for other in others) + needed > self.budget:
            idle = [other for other in others if other.using == 0]
            if not idle:
                raise ApiError(503, f"model: there is no room for {entry.name!r} while others answer; try again",
                               param="model", code="no_memory", headers={"Retry-After": "5"})  # fmt: skip
            oldest = min(idle, key=lambda other: other.used_at)
            others.remove(oldest)
            log.info("%s: unloaded, to make room for %s", oldest.name, entry.name)
            await self._unload(oldest)

    async def _unload(self, entry: Entry) -> None:
        model, entry.model = entry.model, None
        if model is not None:
            await model.stop()
            self.metrics.unloaded(entry.name)

    def _exited(self, entry: Entry, model: RemoteModel) -> None:
        """A process is gone; if nobody asked for that, the next request starts another."""
        if entry.model is model:
            entry.model = None
            self.metrics.crashed(entry.name)
            if not self._closed:
                log.warning("%s: its process has ended by itself; the next request starts it again", entry.name)


async def _load_adapter(model: RemoteModel, entry: Entry) -> None:
    try:
        await model.load_adapter(entry.name, entry.source)
    except DanluError as error:
        raise ApiError(503, f"model: {entry.name!r} cannot be loaded: {error}", code="model_not_loaded") from None
    except WorkerStopped:
        raise shutting_down() from None
    except WorkerFailed as error:
        raise ApiError(500, f"the model failed: {error}", code="model_failed") from None


async def _fetched(source: str) -> Path:
    """Where a model is, which may be downloaded first.

    The thread is a daemon: one that asyncio knows (`to_thread`) would keep the server from ending while a hub is slow.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Path] = loop.create_future()

    def tell(path: Path | None, error: Exception | None) -> None:
        if found.done():
            return
        if path is not None:
            found.set_result(path)
        elif error is not None:
            found.set_exception(error)

    def fetch() -> None:
        path, failure = None, None
        try:
            path = model_path(source)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, path, failure)

    threading.Thread(target=fetch, name=f"fetch {source}", daemon=True).start()
    return await found


def weight_bytes(path: Path) -> int:
    """Size of a model's weights at rest: about what they take in memory."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for kind in ("*.safetensors", "*.gguf", "*.bin") for one in path.glob(kind))


def resident_bytes(pid: int) -> int:
    """Memory of a process; 0 where it is gone or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def machine_bytes() -> int:
    """Memory of the machine, or of the container that this runs in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
