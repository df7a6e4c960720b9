"""Every request but those about health has to come with a key, or from this machine where there are no keys."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.server.access.keys import LOCAL, Caller, Keys
from danlu.server.access.login import login_page
from danlu.server.access.sessions import COOKIE, Sessions
from danlu.server.config import is_loopback
from danlu.server.errors import ApiError, answer_error

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

LOGIN = "/login"
WILDCARDS = frozenset({"0.0.0.0", "::", ""})
"""Addresses that stand for all of the machine's."""


class Auth:
    """ASGI middleware that sets ``request.state.caller``, or answers 401 or 403.

    Args:
        host: the address that the server listens on.
        cors_origin: origins whose pages may call the API.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, sessions: Sessions, *, host: str, cors_origin: tuple[str, ...] = ()
    ) -> None:
        self.app, self.keys, self.sessions = app, keys, sessions
        self.host, self.origins = host.lower(), frozenset(cors_origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"] == "/health" or scope["path"].startswith("/health/"):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            caller = await self._caller(scope, request)
        except ApiError as error:
            if error.status == 401 and _wants_login(scope, request.headers):
                response = login_page(request.headers.get("accept-language", ""))
            else:
                response = await answer_error(request, error)
            await response(scope, receive, send)
            return
        if caller is None:  # on the way to log in
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.keys.headers(caller))
            await send(message)

        await self.app(scope, receive, send_with_limits)

    async def _caller(self, scope: Scope, request: Request) -> Caller | None:
        headers = request.headers
        if not self.keys.required:
            self._require_own_host(headers)
            self._require_own_origin(scope, headers)
            return LOCAL
        if (secret := _presented_key(headers)) is not None:
            return self.keys.check(secret, address_of(scope))
        if scope["path"] == LOGIN and scope["method"] == "POST":
            self._require_own_origin(scope, headers)
            return None
        token = request.cookies.get(COOKIE)
        if token is not None and (key_id := await self.sessions.key_id(token)) is not None:
            caller = self.keys.caller(key_id)
            if caller is not None:
                self._require_own_origin(scope, headers)
                return caller
        raise ApiError(
            401,
            "a key is needed: send it as `Authorization: Bearer sk-danlu-...`; `danlu keys create NAME` makes one",
            code="missing_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _require_own_host(self, headers: Headers) -> None:
        """A page from elsewhere can make its own name point to this machine (DNS rebinding), and would then be of the
        same origin; but the browser tells the name."""
        if self.host in WILDCARDS:
            return  # the user said that whoever reaches the port may use it, under whatever name
        name = _host_name(headers.get("host", ""))
        if name is None or not (is_loopback(name) or name == self.host):
            raise ApiError(
                403,
                f"this server without keys answers only requests to {self.host} and this machine's own names, such as "
                "localhost; to use it under another name, make keys (`danlu keys create NAME`)",
                code="host_not_allowed",
            )

    def _require_own_origin(self, scope: Scope, headers: Headers) -> None:
        """Pages from elsewhere must not act in the name of who looks at them (cross-site request forgery)."""
        origin = headers.get("origin")
        if origin is None or scope["method"] in SAFE or origin in self.origins:
            return
        theirs = _authority(origin)
        if theirs is None or theirs != _authority(f"{urlsplit(origin).scheme}://{headers.get('host', '')}"):
            raise ApiError(
                403,
                "pages of another origin may not use this server; to allow it: danlu serve --cors-origin ORIGIN",
                code="origin_not_allowed",
            )


def address_of(scope: Scope) -> str:
    """Address of the client, as far as the server knows it."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _presented_key(headers: Headers) -> bytes | None:
    """The key of OpenAI's clients or Anthropic's. Other schemes, such as Basic, are for a proxy in front."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip().encode("latin-1")
    own = headers.get("x-api-key")
    return None if own is None else own.strip().encode("latin-1")


def _wants_login(scope: Scope, headers: Headers) -> bool:
    return (
        scope["method"] in ("GET", "HEAD")
        and scope["path"] in ("/", LOGIN)
        and "text/html" in headers.get("accept", "")
    )


def _host_name(host: str) -> str | None:
    """Name or address of a Host header, without port; None where it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _authority(origin: str) -> tuple[str, int] | None:
    """(host, port) of an origin; None where it is none, as "null"."""
    try:
        parts = urlsplit(origin)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None
