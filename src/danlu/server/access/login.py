"""How a browser shows its key: a form without script, and a cookie that scripts cannot read."""

from __future__ import annotations

import base64
import hashlib
import html
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from danlu.server.access.sessions import COOKIE, LIFETIME, Sessions
from danlu.server.errors import ApiError, documented
from danlu.server.schema import Body, Reply

if TYPE_CHECKING:
    from danlu.server.access.keys import Keys

STYLE = """
:root { color-scheme: light dark; --ink: #1f1a17; --paper: #faf7f2; --line: #8a7f75; --fire: #a63c0f; --on-fire: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #efe8e0; --paper: #191513; --line: #8f8379; --fire: #f08a4b; --on-fire: #191513; }
}
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
main { width: min(24rem, 100%); }
h1 { margin: 0 0 .25rem; font-size: 1.5rem; font-weight: 600; }
p { margin: 0 0 1.25rem; }
label { display: block; margin-bottom: .25rem; }
input, button { width: 100%; padding: .65rem .75rem; border-radius: .5rem; font: inherit; }
input { border: 1px solid var(--line); background: transparent; color: inherit; }
button { margin-top: 1rem; border: 0; background: var(--fire); color: var(--on-fire); font-weight: 600;
  cursor: pointer; }
:focus-visible { outline: 2px solid var(--fire); outline-offset: 2px; }
[role=alert] { margin: .75rem 0 0; color: var(--fire); }
"""

POLICY = "; ".join(
    [
        "default-src 'none'",
        f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)

TEXTS = {
    "en": {
        "title": "danlu",
        "intro": "This server asks for a key. It stays in this browser for 30 days.",
        "key": "API key",
        "enter": "Sign in",
        401: "This key is not valid. It may be mistyped or revoked.",
        429: "Too many wrong keys. Wait a minute and try again.",
    },
    "zh-CN": {
        "title": "danlu 丹炉",
        "intro": "此服务器需要密钥。登录状态会在此浏览器中保留 30 天。",
        "key": "API 密钥",
        "enter": "登录",
        401: "密钥无效：可能输入有误，或已被吊销。",
        429: "错误次数过多，请稍后再试。",
    },
}

router = APIRouter(tags=["login"])


class LoginBody(Body):
    """A key to log in with."""

    key: str = Field(max_length=512)


class LoginReply(Reply):
    """Who has logged in."""

    name: str = Field(description="Name of the key.")


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": LoginBody.model_json_schema()},
            "application/x-www-form-urlencoded": {
                "schema": LoginBody.model_json_schema() | {"additionalProperties": True}
            },
        },
    }
}


_HTML: dict[str, Any] = {"content": {"text/html": {}}}  # a form is answered with a form
_ANSWERS: dict[int | str, dict[str, Any]] = {
    **{status: told | (_HTML if status in (400, 401, 429) else {}) for status, told in documented().items()},
    200: {"model": LoginReply},
    303: {"description": "Logged in with a form"},
}


@router.post("/login", summary="Log a browser in", responses=_ANSWERS, openapi_extra=_BODY)
async def log_in(request: Request) -> Response:
    """Set the cookie of a session, for the key in a JSON body or a form."""
    keys: Keys = request.app.state.serving.keys
    sessions: Sessions = request.app.state.serving.sessions
    form = not request.headers.get("content-type", "").startswith("application/json")
    address = request.client.host if request.client else ""
    try:
        if not keys.required:
            raise ApiError(400, "this server has no keys, so there is nothing to log in to", code="no_keys")
        secret = (_key_of_form if form else _key_of_json)(await request.body())
        caller = keys.check(secret.strip().encode(), address)
    except ApiError as error:
        if not form:
            raise
        return login_page(request.headers.get("accept-language", ""), error)
    response = RedirectResponse("/", status_code=303) if form else JSONResponse({"name": caller.name})
    response.set_cookie(
        COOKIE,
        await sessions.begin(caller.id),
        max_age=LIFETIME,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",  # which a proxy in front tells, if the server trusts it
    )
    return response


@router.get("/login", include_in_schema=False)
async def logged_in() -> Response:
    """Whoever gets here has a session already."""
    return RedirectResponse("/", status_code=303)


@router.post("/logout", summary="Log a browser out", status_code=204, responses=documented(), response_class=Response)
async def log_out(request: Request) -> Response:
    """End the session and take its cookie away."""
    sessions: Sessions = request.app.state.serving.sessions
    if (token := request.cookies.get(COOKIE)) is not None:
        await sessions.end(token)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


def login_page(accept_language: str, error: ApiError | None = None) -> Response:
    """The form, in the reader's language.

    Args:
        error: why the last key was refused.
    """
    language = language_of(accept_language)
    words = TEXTS[language]
    told = "" if error is None else words.get(error.status, error.message)
    alert = f'<p role="alert" id="error">{html.escape(told)}</p>' if told else ""
    page = f"""<!doctype html>
<html lang="{language}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{words["title"]}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
<main>
<h1>{words["title"]}</h1>
<p>{words["intro"]}</p>
<form method="post" action="/login">
<input name="username" autocomplete="username" value="danlu" hidden>
<label for="key">{words["key"]}</label>
<input id="key" name="key" type="password" required autofocus autocomplete="current-password" spellcheck="false">
{alert}
<button>{words["enter"]}</button>
</form>
</main>
"""
    headers = {"Content-Security-Policy": POLICY, "Vary": "Accept, Accept-Language, Cookie"}
    status = 401 if error is None else error.status
    return HTMLResponse(page, status, headers | (error.headers if error else {"WWW-Authenticate": "Bearer"}))


def language_of(accept_language: str) -> str:
    """The first language of a browser's list that the page is written in; English if there is none."""
    for part in accept_language.lower().split(","):
        name = part.split(";")[0].strip()
        if name.split("-")[0] == "zh":
            return "zh-CN"
        if name.split("-")[0] == "en":
            return "en"
    return "en"


def _key_of_json(body: bytes) -> str:
    try:
        return LoginBody.model_validate_json(body).key
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _key_of_form(body: bytes) -> str:
    try:
        fields = parse_qs(body.decode(), strict_parsing=True, max_num_fields=4)
    except ValueError as error:
        raise ApiError(400, "the form cannot be read; it has one field, key", code="invalid_form") from error
    values = fields.get("key", [])
    if len(values) != 1:
        raise ApiError(400, "key: is missing", param="key", code="missing_required_parameter")
    return values[0]
