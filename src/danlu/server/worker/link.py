"""The worker's end of the socket to the server."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from danlu.errors import DanluError
from danlu.server.protocol import HEADER, pack


class Link:
    """The socket to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._incoming = connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; any thread may."""
        data = pack(message)
        with self._sending:
            try:
                self._connection.sendall(data)
            except OSError:
                os._exit(0)  # the server is gone

    def receive(self) -> dict[str, Any]:
        """The next message. The process ends where there is none."""
        try:
            header = self._incoming.read(HEADER.size)
            if len(header) < HEADER.size:
                os._exit(0)
            body = self._incoming.read(HEADER.unpack(header)[0])
        except OSError:  # the server was in a hurry
            os._exit(0)
        message: dict[str, Any] = json.loads(body)
        return message

    def answer(self, number: int, work: Callable[[], Any]) -> None:
        """Send what ``work`` returns, or why it does not."""
        try:
            result = work()
        except Exception as error:
            self.refuse(number, error)
        else:
            if result is not None:
                self.send({"id": number, "result": result})

    def refuse(self, number: int, error: Exception) -> None:
        """Say why there is no result."""
        user = isinstance(error, DanluError)
        self.send({"id": number, "error": str(error) if user else f"{type(error).__name__}: {error}", "user": user})
