"""What answers tell a browser: to trust their types, to run nothing, to keep nothing, and whose pages may read them."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALWAYS = {
    b"x-content-type-options": b"nosniff",
    # With "no-referrer" a browser sends `Origin: null` along with forms, and the login would look like another site's.
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"x-frame-options": b"DENY",
    b"permissions-policy": b"camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    # An answer that is a page brings its own policy; JSON that a browser is made to open as a page may do nothing.
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
"""Headers of every answer that does not have them already."""


class SecurityHeaders:
    """ASGI middleware that adds :data:`ALWAYS`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                there = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in ALWAYS.items() if name not in there]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def cors(origins: tuple[str, ...]) -> list[Middleware]:
    """The middleware that lets pages of these origins call the API; none of them: no page of another origin may.

    Cookies are not let through: such pages need a key of their own.
    """
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),  # the official clients send a dozen of their own
            expose_headers=(
                "x-request-id",
                "retry-after",
                *(
                    f"x-ratelimit-{what}-{of}"
                    for what in ("limit", "remaining", "reset")
                    for of in ("requests", "tokens")
                ),
            ),
        )
    ]
