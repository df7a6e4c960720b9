"""The files of the chat page: what they are, and how they are served."""

from __future__ import annotations

import gzip
import hashlib
import json
import re

import httpx
import pytest

from danlu.server.page import FOLDER, page_files

OUR_FILES = [path for path in FOLDER.rglob("*") if path.is_file() and path.parent.name != "vendor"]


def test_libraries_are_those_that_are_pinned() -> None:
    """Each comes with its licence, and there is nothing besides."""
    libraries = json.loads((FOLDER / "vendor/vendor.json").read_text("utf-8"))
    listed = {"vendor.json"}
    for library in libraries:
        assert {"name", "version", "license", "npm"} <= set(library)
        for field in ("file", "license_file"):
            content = (FOLDER / "vendor" / library[field]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == library[f"{field}_sha256"], library[field]
            listed.add(library[field])
    assert {path.name for path in (FOLDER / "vendor").iterdir()} == listed


def test_every_file_is_served(tiny_url: str) -> None:
    """As what it is, under a policy that lets no other script run; and once only."""
    with httpx.Client(base_url=tiny_url, trust_env=False) as client:
        for path in [*FOLDER.rglob("*.*")]:
            place = "/" if path.name == "index.html" else f"/page/{path.relative_to(FOLDER).as_posix()}"
            answer = client.get(place)
            assert answer.status_code == 200, place
            assert answer.content == path.read_bytes()
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers.get_list("content-security-policy")
            assert len(policy) == 1
            assert "script-src 'self'" in policy[0]
            assert "unsafe" not in policy[0]
            assert "require-trusted-types-for 'script'" in policy[0]
            again = client.get(place, headers={"If-None-Match": f'"other", {answer.headers["etag"]}'})
            assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page/js/main.js", "text/javascript"), ("/page/css/base.css", "text/css")],
)
def test_a_file_has_the_type_that_browsers_ask_for(tiny_url: str, path: str, kind: str) -> None:
    answer = httpx.get(tiny_url + path, trust_env=False)
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert httpx.head(tiny_url + path, trust_env=False).status_code == 200


def test_files_are_compressed_for_those_who_can_read_it(tiny_url: str) -> None:
    def size(encoding: str) -> int:
        with httpx.stream("GET", f"{tiny_url}/page/vendor/katex.js", headers={"Accept-Encoding": encoding}) as answer:
            raw = b"".join(answer.iter_raw())
        plain = gzip.decompress(raw) if answer.headers.get("content-encoding") == "gzip" else raw
        assert plain == (FOLDER / "vendor/katex.js").read_bytes()
        assert answer.headers["vary"] == "Accept-Encoding"
        return len(raw)

    assert size("gzip") < size("identity") / 2


@pytest.mark.parametrize(
    "path",
    ["", "nothing.js", "../page.py", "%2e%2e/page.py", "js/../../page.py", "/etc/passwd", "js", "js%00", "\\..\\x"],
)
def test_nothing_else_is_served(tiny_url: str, path: str) -> None:
    answer = httpx.get(f"{tiny_url}/page/{path}", trust_env=False)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_the_page_asks_nothing_of_elsewhere() -> None:
    """No address of another host, no inline script or style, no way to make HTML but through DOMPurify."""
    for path in OUR_FILES:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://[a-z]", text), path.name
        if path.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|<script(?![^>]*\ssrc=)|\son\w+=", text)
        if path.suffix == ".js" and "innerHTML" in text:
            assert re.findall(r"innerHTML = (.*)\(", text) == ["DOMPurify.sanitize"], path.name
        assert not re.search(r"\beval\(|new Function|insertAdjacentHTML|document\.write|outerHTML", text), path.name


def test_someone_with_a_key_can_sign_out() -> None:
    files = page_files()
    assert b"<html data-keys lang" in files["signed-in.html"].plain
    assert b"data-keys" not in files["index.html"].plain
