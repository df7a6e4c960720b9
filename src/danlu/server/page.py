"""The chat page: files of the package, as they are, at / and /page/."""

from __future__ import annotations

import functools
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from danlu.server.errors import ApiError

FOLDER = Path(__file__).parent / "page"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}
"""What is served, and as what. A browser is told to believe the type, so a file of another kind is not served."""

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
"""The page's content security policy: no inline script or style, nothing from elsewhere, and HTML made from text (which
only DOMPurify does) goes no other way (Trusted Types)."""

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """A file of the page: its bytes, plain and compressed."""

    media_type: str
    plain: bytes
    compressed: bytes
    etag: str


@functools.cache
def page_files() -> dict[str, PageFile]:
    """All files of the page by their path below its folder. They are read once: what is asked for later can name no
    file outside."""
    found = {
        path.relative_to(FOLDER).as_posix(): _page_file(path.read_bytes(), TYPES[path.suffix])
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in TYPES and path.is_file()
    }
    # Where there are keys, whoever sees the page has signed in with one, and may want to sign out.
    index = found["index.html"].plain.replace(b"<html ", b"<html data-keys ", 1)
    return {**found, "signed-in.html": _page_file(index, TYPES[".html"])}


def _page_file(plain: bytes, media_type: str) -> PageFile:
    etag = f'W/"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return PageFile(media_type, plain, gzip.compress(plain, mtime=0), etag)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, page_files()["signed-in.html" if request.app.state.serving.keys.required else "index.html"])


@router.api_route("/page/{path:path}", methods=["GET", "HEAD"])
async def static(request: Request, path: str) -> Response:
    """What the page is made of."""
    file = page_files().get(path)
    if file is None:
        raise ApiError(404, f"there is no /page/{path}")
    return _answer(request, file)


def _answer(request: Request, file: PageFile) -> Response:
    headers = {
        "ETag": file.etag,
        # Asked for again at each visit, which costs an empty 304: after an update no old module meets a new one.
        "Cache-Control": "no-cache",
        "Vary": "Accept-Encoding",
        "Content-Security-Policy": POLICY,
    }
    if file.etag in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    body = file.plain
    if "gzip" in request.headers.get("accept-encoding", ""):
        body, headers["Content-Encoding"] = file.compressed, "gzip"
    return Response(body, headers=headers, media_type=file.media_type)
