"""A server that speaks enough of the Hugging Face protocol for huggingface_hub to fetch from it, over a real socket."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """Repositories and what was asked of them. ``repos``: 'models/org/name' -> revision -> file name -> content."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """'models/org/name' -> (status, X-Error-Code)."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)."""
    damage: set[str] = field(default_factory=set)
    """Files that are sent with one byte changed."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """Files of which so many bytes are sent, and then nothing for a long time."""
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main", kind: str = "models") -> str:
        """Commit files; gives the commit hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        revisions = self.repos.setdefault(f"{kind}/{repo}", {})
        revisions[commit] = revisions[branch] = dict(files)
        return commit

    def downloads(self, name: str) -> list[str]:
        """Range headers of the requests for a file's content."""
        return [range_ for method, path, range_ in self.requests if method == "GET" and path.endswith(f"/{name}")]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    """Weights are kept by their SHA-256 (LFS), small files by git's hash, as on the real hub."""
    return name.endswith((".safetensors", ".bin", ".gguf", ".parquet"))


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        parts = path.split("/")
        if parts[0] == "api":
            self.answer_api(parts[1], "/".join(parts[2:4]), parts[4:])
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            self.answer_file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def find(self, kind: str, repo: str, revision: str) -> dict[str, bytes] | None:
        if refusal := self.hub.refused.get(f"{kind}/{repo}"):
            self.refuse(*refusal)
            return None
        revisions = self.hub.repos.get(f"{kind}/{repo}")
        if revisions is None:
            self.refuse(404, "RepoNotFound")
            return None
        if revision not in revisions:
            self.refuse(404, "RevisionNotFound")
            return None
        return revisions[revision]

    def commit_of(self, kind: str, repo: str, files: dict[str, bytes]) -> str:
        return next(
            name for name, content in self.hub.repos[f"{kind}/{repo}"].items() if len(name) == 40 and content == files
        )

    def refuse(self, status: int, code: str) -> None:
        self.send(
            status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "Content-Type": "application/json"}
        )

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_api(self, kind: str, repo: str, rest: list[str]) -> None:
        files = self.find(kind, repo, rest[1] if len(rest) > 1 else "main")
        if files is None:
            return
        if rest[:1] == ["tree"]:
            listing: object = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": git_sha1(content),
                    **self.lfs(name, content, "oid"),
                }
                for name, content in files.items()
            ]
        else:
            siblings = [
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": git_sha1(content),
                    **self.lfs(name, content, "sha256"),
                }
                for name, content in files.items()
            ]
            listing = {"id": repo, "modelId": repo, "sha": self.commit_of(kind, repo, files), "siblings": siblings}
            listing |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
        self.send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def lfs(self, name: str, content: bytes, key: str) -> dict[str, object]:
        if not is_large(name):
            return {}
        return {"lfs": {key: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}

    def answer_file(self, kind: str, repo: str, revision: str, name: str) -> None:
        files = self.find(kind, repo, revision)
        if files is None:
            return
        if name not in files:
            self.refuse(404, "EntryNotFound")
            return
        whole = files[name]
        etag = hashlib.sha256(whole).hexdigest() if is_large(name) else git_sha1(whole)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit_of(kind, repo, files), "Accept-Ranges": "bytes"}
        if name in self.hub.damage:
            whole = whole[:-1] + bytes([whole[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        limit = self.hub.stall_after.get(name)
        if self.command == "GET" and limit is not None and not self.hub.released.is_set():
            self.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(whole))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(whole[:limit])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.released.wait(60)
            self.close_connection = True
            return
        self.send(206 if start else 200, whole[start:], headers)
