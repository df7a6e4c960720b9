"""Somebody who has answers streamed while others do what they should not, and looks that none of them suffers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
from prometheus_client.parser import text_string_to_metric_families

ASKED = {"prompt": "def f1(x):", "max_tokens": 60, "seed": 7, "temperature": 1, "stream": True}


class Bystander:
    """Streams one answer after the other; `.harmed` tells of those that were not what they are alone."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        self.url, self.whole = url, 0
        self.harmed: list[str] = []
        self._client = httpx.Client(trust_env=False, timeout=60, headers=headers)
        self._alone = self._answer()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop, after the answer that is being streamed."""
        self._ending.set()
        self._thread.join(60)

    def _watch(self) -> None:
        while not self._ending.is_set():
            try:
                answer = self._answer()
            except (httpx.HTTPError, ValueError, KeyError) as error:
                answer = repr(error)
            if answer == self._alone:
                self.whole += 1
            else:
                self.harmed.append(answer)
            time.sleep(0.02)

    def _answer(self) -> str:
        """Text and end; it fails on whatever is no whole stream."""
        with self._client.stream("POST", f"{self.url}/v1/completions", json=ASKED) as response:
            response.raise_for_status()
            *events, done = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data")]
        if done != "[DONE]":
            raise ValueError(done)
        choices = [json.loads(event)["choices"][0] for event in events]
        return "".join(choice["text"] for choice in choices) + f" ({choices[-1]['finish_reason']})"


def engine_of(url: str, headers: dict[str, str] | None = None) -> dict[str, float]:
    """What the metrics tell of the engine, all models together."""
    text = httpx.get(f"{url}/metrics", headers=headers, trust_env=False, timeout=30).text
    samples: Iterator[tuple[str, float]] = (
        (sample.name.removeprefix("danlu_"), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )
    found: dict[str, float] = {}
    for name, value in samples:
        if name in ("cache_blocks_used", "running", "queue", "requests_in_flight"):
            found[name] = found.get(name, 0) + value
    return found


def wait_until_idle(url: str, headers: dict[str, str] | None = None, seconds: float = 20) -> None:
    """Nothing runs and no block of the cache is held."""
    end = time.monotonic() + seconds
    while any(found := engine_of(url, headers).values()):
        assert time.monotonic() < end, f"blocks or answers are left: {found}"
        time.sleep(0.1)
