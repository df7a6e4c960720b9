"""The process of one model: requests come in over a socket, pieces of answers go out (see protocol.py).

The main thread runs the engine and nothing else. What takes time before a request can run (templates, tokens,
grammars) is done by other threads, so that it holds up no running answer. The process ends with its socket.

    python -m danlu.server.worker FD NAME SOURCE CONFIG
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from danlu import config as configs
from danlu.engine.engine_config import EngineConfig
from danlu.errors import DanluError
from danlu.hub.pull import model_path
from danlu.server.worker.encoder import EncoderWorker
from danlu.server.worker.encoders import open_encoder
from danlu.server.worker.generator import GeneratorWorker
from danlu.server.worker.link import Link

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Open the model and serve it until the socket closes."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # the server tells when to end, by closing the socket
        signal.signal(signal_number, signal.SIG_IGN)
    if sys.platform == "linux":  # the socket tells too, but not to a process that is busy or was stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    fd, name, source, options = sys.argv[1:]
    link = Link(socket.socket(fileno=int(fd)))
    incoming: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    worker: GeneratorWorker | EncoderWorker | None = None

    def receive() -> None:
        while True:
            message = link.receive()
            if worker is None:
                incoming.put(message)
            else:
                worker.take(message)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    try:
        path = model_path(source)
        if (encoder := open_encoder(path)) is not None:
            worker = EncoderWorker(link, name, encoder)
        else:
            worker = GeneratorWorker(link, name, path, configs.load(EngineConfig, values=json.loads(options)))
    except (DanluError, OSError, MemoryError) as error:
        link.refuse(0, error if isinstance(error, DanluError) else DanluError(f"{source}: {error}"))
        os._exit(1)
    link.send({"id": 0, "result": dataclasses.asdict(worker.info)})
    worker.run()


if __name__ == "__main__":
    main()
