"""Many clients at once, some of which go away: `python benchmarks/server.py --soak`, and tests/server/test_load.py."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from server_client import RequestFailed, chat, send

WORDS = [
    "furnace", "cinnabar", "mercury", "crane", "cloud", "peak", "river", "lantern", "scroll", "jade", "copper", "bell",
]  # fmt: skip

PROBE = """
import http.client, json, sys, time
connection, found = http.client.HTTPConnection(sys.argv[1], timeout=30), []
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    start = time.perf_counter()
    connection.request("GET", "/health/live")
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        sys.exit(f"/health/live answered {answer.status}")
    found.append(time.perf_counter() - start)
    time.sleep(0.02)
print(json.dumps(found))
"""


@dataclass
class Soak:
    """What came of it.

    Attributes:
        answered, left, refused: requests that were answered whole, that the client left, that got 429.
        failed: what went wrong with others, and how often.
        live_p50, live_p99: seconds that GET /health/live took meanwhile.
        growth: of the memory of each process in the second half, as a share.
        memory: proportional set sizes in bytes at the end.
        blocks_held: blocks of the KV cache that no answer holds any longer, but are not free.
    """

    seconds: float
    clients: int
    answered: int = 0
    left: int = 0
    refused: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    live_p50: float = 0.0
    live_p99: float = 0.0
    growth: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    blocks_held: int = 0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def soak(
    url: str, process: int, seconds: float, *, clients: int = 64, leaving: float = 0.2, tokens: int = 64, seed: int = 0
) -> Soak:
    """Have clients ask for streams one after the other.

    Args:
        url: of `danlu serve`.
        process: its id.
        leaving: share of requests whose client goes away before the end.
        tokens: of an answer, at most.
    """
    found = Soak(seconds, clients)
    probe = subprocess.Popen(
        [sys.executable, "-c", PROBE, url.partition("//")[2], str(seconds)], stdout=subprocess.PIPE, text=True
    )
    samples: dict[str, list[int]] = {}
    asyncio.run(_load(url, process, found, samples, leaving, tokens, random.Random(seed)))
    told = probe.communicate(timeout=60)[0]
    live = sorted(json.loads(told)) if told.strip() else [float("inf")]
    found.live_p50, found.live_p99 = live[len(live) // 2], live[int(len(live) * 0.99)]
    for name, sizes in samples.items():
        second = sizes[len(sizes) // 2 :]
        n = max(1, len(second) // 5)
        found.growth[name] = statistics.median(second[-n:]) / statistics.median(second[:n]) - 1
        found.memory[name] = sizes[-1]
    found.blocks_held = _blocks_held(url)
    return found


def processes(server: int) -> dict[str, int]:
    """The server's process and those of its models."""
    below = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return {"server": server, **{f"model {number}": int(one) for number, one in enumerate(below)}}


def memory_of(process: int) -> int:
    """Proportional set size in bytes."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) * 1024


def metric(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^danlu_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


async def _load(
    url: str, process: int, found: Soak, samples: dict[str, list[int]], leaving: float, tokens: int, dice: random.Random
) -> None:
    end = time.monotonic() + found.seconds
    alive = processes(process)
    for name in alive:
        samples[name] = []

    async def client() -> None:
        while time.monotonic() < end:
            content = " ".join(dice.choices(WORDS, k=dice.randint(1, 40)))
            body = {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": dice.randint(1, tokens), "ignore_eos": True, "stream": True, "seed": 0,
            }  # fmt: skip
            patience = dice.expovariate(1.0) if dice.random() < leaving else None
            try:
                answer = await send(url, chat(url, body), patience)
                if answer.status == 429:
                    found.refused += 1
                    await asyncio.sleep(min(1.0, float(answer.header("retry-after") or 1)))
                    continue
                try:
                    answer.events()
                    found.answered += 1
                except RequestFailed:
                    if patience is None:
                        raise
                    found.left += 1
            except (RequestFailed, OSError) as error:
                why = f"{type(error).__name__}: {error}"[:200]
                found.failed[why] = found.failed.get(why, 0) + 1
                await asyncio.sleep(0.1)

    async def watch() -> None:
        while time.monotonic() < end:
            for name, one in alive.items():
                samples[name].append(memory_of(one))
            await asyncio.sleep(found.seconds / 100)

    await asyncio.gather(watch(), *(client() for _ in range(found.clients)))


def _blocks_held(url: str) -> int:
    """Once nothing runs any longer."""
    end = time.monotonic() + 10
    while metric(url, "requests_in_flight") + metric(url, "running") + metric(url, "cache_blocks_used"):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return int(metric(url, "cache_blocks_used"))
