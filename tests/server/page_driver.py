"""The chat page in a real Chromium, on a real server."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, serving

# Nothing that the browser itself wants from its maker is wanted here.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ENDLESS = {"seed": 1, "extra": {"ignore_eos": True}}
SHORT = {"max_tokens": 12, **ENDLESS}
LONG = {"max_tokens": 3000, **ENDLESS}
"""How long the babble of the tiny model is."""


class Visitor:
    """Somebody who looks at the page in a window of their own, and writes down what goes wrong.

    Args:
        parameters: the settings of a new conversation.
        options: of the browser's context, such as ``viewport``, ``locale``, ``color_scheme``.
    """

    def __init__(self, browser: Any, url: str, parameters: dict[str, Any], **options: Any) -> None:
        self.url, self.complaints, self.foreign = url, list[str](), list[str]()
        self.expected: tuple[str, ...] = ()
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **options})
        settings = json.dumps({"system": "", "parameters": parameters})
        self.context.add_init_script(f"localStorage['danlu.settings'] ??= {json.dumps(settings)}")
        self._pending = 0
        self.context.on("request", self._watch)
        self.context.on("requestfinished", self._forget)
        self.context.on("requestfailed", self._forget)
        self.context.set_default_timeout(90_000)  # a model may have to be loaded, beside other tests
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self._complain(message.type, message.text))
        self.page.on("pageerror", lambda error: self._complain("error", str(error)))
        self.open()

    def open(self, place: str = "") -> None:
        """Go to an address of the page."""
        self.page.goto(f"{self.url}/{place}")
        self.wait_until_ready()

    def reload(self) -> None:
        """Load the page anew."""
        self.page.reload()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Models and conversations are there."""
        self.page.wait_for_selector("html[data-ready]")

    def ask(self, text: str, *, wait: bool = True) -> None:
        """Send a message; by default wait for the answers."""
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        self.page.wait_for_selector(".answer")
        if wait:
            self.wait_for_answers()

    def wait_for_answers(self) -> None:
        """Nothing is being written, and everything is kept."""
        self.page.wait_for_selector("#composer [type=submit][data-running=false]")
        self.wait_until_kept()

    def wait_until_kept(self) -> None:
        """All requests have been answered."""
        self.page.wait_for_timeout(20)
        self.until(lambda: not self._pending)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something. (Playwright's own way evaluates text, which the page's policy forbids.)"""
        end = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < end, "waited in vain"
            self.page.wait_for_timeout(20)

    def texts(self, selector: str) -> list[str]:
        """What can be read there."""
        return list(self.page.locator(selector).filter(visible=True).all_inner_texts())

    def answers(self) -> list[str]:
        """The texts of the answers that are shown."""
        return self.texts(".answer > .markdown")

    def picture(self, name: str) -> None:
        """Keep a picture of the page, where they are wanted."""
        if folder := os.environ.get("DANLU_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(200)  # transitions end
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))

    def _watch(self, request: Any) -> None:
        self._pending += 1
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.foreign.append(request.url)

    def _forget(self, _: Any) -> None:
        self._pending -= 1

    def _complain(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(known in text for known in self.expected):
            self.complaints.append(f"{kind}: {text}")


@pytest.fixture(scope="session")
def page_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`danlu serve` with two models."""
    data = tmp_path_factory.mktemp("page-server")
    with serving(f"--model=tiny={model_folder}", f"--model=other={model_folder}", data=data) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, which CI must have; elsewhere the tests are skipped without it."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium; CI has to install it")
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, page_server: ServerProcess) -> Iterator[Callable[..., Visitor]]:
    """Opens the page. In the end no visitor has anything to complain about, and nothing was asked of another origin."""
    visitors: list[Visitor] = []

    def open_page(parameters: dict[str, Any] | None = None, **options: Any) -> Visitor:
        visitors.append(Visitor(browser, page_server.url, SHORT if parameters is None else parameters, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
        assert not visitor.complaints, visitor.complaints
        assert not visitor.foreign, visitor.foreign


@pytest.fixture
def keep(page_server: ServerProcess) -> Callable[..., str]:
    """Puts a conversation on the server: messages as (role, fields); its id."""

    def keep_conversation(*messages: tuple[str, dict[str, Any]], title: str = "Kept", models: int = 1) -> str:
        whole = [
            {"id": f"m{at}", "parent": f"m{at - 1}" if at else None, "role": role, "model": "tiny", **fields}
            for at, (role, fields) in enumerate(messages)
        ]
        for message in whole:
            message.setdefault("finish_reason", "stop")
        conversation = {"title": title, "models": ["tiny", "other"][:models], "messages": whole}
        body = {"format": "danlu-conversations", "conversations": [conversation]}
        answer = httpx.post(f"{page_server.url}/api/conversations/import", json=body, trust_env=False)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["data"][0]["id"])

    return keep_conversation


def saying(text: str) -> dict[str, Any]:
    """Settings with which a model says just this."""
    return {"extra": {"structured_outputs": {"choice": [text]}}}
