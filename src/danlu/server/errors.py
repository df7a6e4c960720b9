"""Errors as clients of OpenAI and Anthropic know them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.errors import DanluError, Problems

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status -> type; others are the client's (4xx) or the server's (5xx)."""

ANTHROPIC_PATHS = "/v1/messages"
"""What is below answers in the shape of Anthropic's API."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what was wrong, and how to mend it.
        param: the field of the body that it is about, as ``messages.0.content``.
        code: a word for programs, such as ``model_not_found``.
        headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The kind of error."""
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self, path: str = "", request_id: str | None = None) -> dict[str, Any]:
        """The error as JSON, in the shape that clients of ``path`` expect."""
        if path.startswith(ANTHROPIC_PATHS):
            kind = "api_error" if self.type == "server_error" else self.type
            return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """An error in Anthropic's shape."""

    type: str = Field("error")
    error: AnthropicErrorDetail
    request_id: str | None = None


def documented(*more: int, anthropic: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: every error it may answer with."""
    model = AnthropicErrorBody if anthropic else ErrorBody
    statuses = {400, 401, 403, 408, 413, 415, 429, 500, 503, *more}
    return {status: {"model": model, "description": TYPES.get(status, "error")} for status in sorted(statuses)}


def from_user_error(error: DanluError, names: Mapping[str, str] | None = None) -> ApiError:
    """What the package says to a user, as an answer to a client.

    Args:
        names: the package's options -> fields of the request.
    """
    text = error.problems[0] if isinstance(error, Problems) and error.problems else str(error)
    if names:  # all at once: what a name was replaced by may hold another's
        text = re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda own: names[own[1]], text)
    found = re.match(r"([\w.]+): ", text)
    param = found[1] if found and found[1].islower() else None
    return ApiError(400, text, param=param, code="invalid_value")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body, a query or a path."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    where = [
        part
        for part in place[place[:1] in (["body"], ["query"], ["path"], ["header"]) :]
        if not re.search(r"[\[(]|^(function-|constrained-|str$|int$|float$|bool$|list$|dict$|[A-Z])", part)
    ]
    param = ".".join(where) or None
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return ApiError(
            400, f"{param}: is not supported by this server; leave it out", param=param, code="unsupported_parameter"
        )
    if kind == "missing":
        return ApiError(400, f"{param or 'the body'}: is missing", param=param, code="missing_required_parameter")
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


async def answer_error(request: Request, error: Exception) -> Response:
    """Exception handler for all of them."""
    if isinstance(error, RequestValidationError):
        error = from_validation(error)
    elif isinstance(error, DanluError):
        error = from_user_error(error)
    elif isinstance(error, HTTPException):
        message = f"there is no {request.url.path}" if error.status_code == 404 else str(error.detail)
        error = ApiError(error.status_code, message, headers=error.headers)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed to answer; its log says more", code="internal_error")
    request.state.error_code = error.code or error.type  # for the log and the metrics
    request_id = getattr(request.state, "request_id", None)
    return JSONResponse(error.body(request.url.path, request_id), status_code=error.status, headers=error.headers)
