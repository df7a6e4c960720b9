"""An endpoint of the standard library's HTTP server, which says what a test wants it to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
Script = Callable[[dict[str, Any], int], Reply]
"""The body of a request, and how many came with the same messages and seed before it -> what is said."""


@dataclass
class Endpoint:
    """Its address, and the requests that came: path, headers, body."""

    url: str
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    @property
    def asked(self) -> list[str]:
        """What users said last."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]


def answer(text: str | None, finish_reason: str | None = "stop", **message: Any) -> Reply:
    """A response as the API has it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice], "usage": usage}).encode()


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    """An error as the API has it."""
    return status, headers or {}, json.dumps({"error": {"message": message, **fields}}).encode()


def user(body: dict[str, Any]) -> str:
    """What the user said last."""
    said: str = body["messages"][-1]["content"]
    return said


@contextlib.contextmanager
def endpoint(script: Script) -> Iterator[Endpoint]:
    """Serve a script on a free port."""
    known: dict[str, int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = json.dumps([body["messages"], body.get("seed")])
            with lock:
                before = known.get(key, 0)
                known[key] = before + 1
                served.requests.append((self.path, dict(self.headers), body))
            status, headers, content = script(body, before)
            with contextlib.suppress(OSError):  # who asked has gone
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
