"""An application of a test, served over real sockets by a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from danlu.server.config import ServeConfig
from danlu.server.operation.connections import uvicorn_config


@contextlib.contextmanager
def serving_app(app: ASGIApp, config: ServeConfig) -> Iterator[tuple[str, int]]:
    """The address of ``app``, served as `danlu serve` would."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(config, app))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield listener.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(20)
