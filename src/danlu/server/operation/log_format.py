"""Lines of the server's log: text for people or one JSON object each, for our own loggers and those of the libraries.

Whatever a client sent is written so that it cannot pass for another line or another field.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any, Literal, TextIO

log = logging.getLogger("danlu.server")

request_id_now: ContextVar[str | None] = ContextVar("request_id_now", default=None)
"""Of the request that this task works for: each line says it."""

LONGEST_ERROR = 500
"""Characters of an exception's message: some repeat what they were given."""


def set_up_logs(log_format: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Send every logger of this process to ``stream`` (standard error), as text or JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.WARNING)
    logging.captureWarnings(True)


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII: nothing in it can end the line or steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; ``extra={"fields": {...}}`` become keys."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["error"] = _error(record)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """``TIME LEVEL MESSAGE key=value ...``; the lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        words = [_time(record), f"{record.levelname:7}", visible(record.getMessage())]
        words += [f"{key}={_word(value)}" for key, value in _fields(record).items()]
        line = " ".join(words)
        if record.exc_info:
            line += "".join(f"\n    {visible(one)}" for one in _error(record).splitlines())
        return line


def visible(text: str) -> str:
    r"""``text`` on one line: what does not print (line ends, controls, marks of direction, surrogates) as ``\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _word(value: Any) -> str:
    """A value that ends where it seems to end."""
    text = visible(str(value))
    return text if text and not set(text) & set(' "=') else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    request_id = request_id_now.get()
    return fields if request_id is None else {**fields, "request_id": request_id}


def _time(record: logging.LogRecord) -> str:
    """UTC, as ISO 8601 has it."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _error(record: logging.LogRecord) -> str:
    assert record.exc_info is not None
    told = traceback.TracebackException(*record.exc_info)
    text = "".join(told.format())
    message = str(record.exc_info[1])
    return text.replace(message, message[:LONGEST_ERROR] + "...") if len(message) > LONGEST_ERROR else text
