"""What `inference.py` measures: the prompts of a turn, and how a contestant is timed on them."""

from __future__ import annotations

import inspect
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from inference_peers import IMPORTS, PEERS, START
from inference_worker import PeerFailed, Run, Worker, environment

from danlu.tokenizer.tokenizer import Tokenizer

Prompts = list[list[int]]

PROMPT, CACHED, NEW = 402, 384, 200
STREAMS, SHORT_PROMPT, SHORT_NEW = 16, 128, 128
STREAM_PROMPT, STREAM_NEW = 384, 128
LENGTH = 768
"""Tokens that a sequence may have; the longest takes 602."""

MODULES = ("argparse", "ast", "doctest", "inspect", "tarfile", "typing", "zipfile")
"""Of the standard library: their source is the text of the prompts."""

COPIED = '''def read_settings(path):
    """Read the settings of a program from a text file.

    Every line holds a name and a value with an equals sign between them. Empty lines and lines that
    begin with a hash are skipped. A value that looks like a number becomes a number, and the words
    yes and no become True and False; everything else stays text.

    Raises an error that tells the number of the line when the equals sign is missing.
    """
    settings = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"line {number}: there is no equals sign")
            name, value = name.strip(), value.strip()
            if value in ("yes", "no"):
                settings[name] = value == "yes"
            elif value.isdigit():
                settings[name] = int(value)
            else:
                settings[name] = value
    return settings
'''
"""What the model is asked to repeat with one name changed."""

COPY_NEW = 240


class Texts:
    """Prompts that no one has seen before, so that no prefix cache helps unless it should."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        text = "".join(inspect.getsource(import_module(name)) for name in MODULES)
        self._ids = tokenizer.encode(text)
        self._at = 0

    def take(self, n: int) -> list[int]:
        """The next n tokens."""
        if self._at + n > len(self._ids):
            raise SystemExit(f"the {len(self._ids)} tokens of text are used up; measure fewer rounds")
        self._at += n
        return self._ids[self._at - n : self._at]

    def copy_task(self) -> list[int]:
        """A chat that asks for :data:`COPIED` with one name changed."""
        asked = "Repeat this Python function unchanged, except that `settings` is renamed to `options`:"
        message = {"role": "user", "content": f"{asked}\n\n```python\n{COPIED}```"}
        return self._tokenizer.encode_chat([message], add_generation_prompt=True)


class Contestant:
    """An engine in an environment; its processes start when they are needed."""

    def __init__(self, name: str, engine: str, python: str, model: Path, threads: int) -> None:
        self.name, self.engine, self.python, self.model, self.threads = name, engine, python, model, threads
        self._workers: dict[str, Worker] = {}

    def open(self, length: int = LENGTH, drafts: bool = False) -> Worker:
        """A new process."""
        settings = {"model": str(self.model), "threads": self.threads, "streams": STREAMS, "length": length}
        return Worker(self.engine, self.python, {**settings, "drafts": drafts})

    def worker(self, drafts: bool = False) -> Worker:
        """The process that stays alive, warmed up."""
        key = "drafts" if drafts else "plain"
        if key not in self._workers:
            self._workers[key] = self.open(drafts=drafts)
            self._workers[key].complete([list(range(100, 164))], 8)
        return self._workers[key]

    @property
    def idle_cores(self) -> float | None:
        """See :class:`Worker`."""
        return self._workers["plain"].idle_cores if "plain" in self._workers else None

    def run_program(self, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Python code in a new process of the environment."""
        return subprocess.Popen(
            [self.python, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment(self.threads),
        )  # fmt: skip

    def close(self) -> None:
        """End its processes."""
        while self._workers:
            self._workers.popitem()[1].close()


def decode(contestant: Contestant, prompts: Prompts) -> dict[str, float]:
    """Tokens after the first of one stream."""
    return {"tok/s": contestant.worker().complete(prompts, NEW).decode_rate}


def prefill(contestant: Contestant, prompts: Prompts) -> dict[str, float]:
    """A prompt, to its first token."""
    return {"tok/s": len(prompts[0]) / contestant.worker().complete(prompts, 1).first_seconds}


def batch(contestant: Contestant, prompts: Prompts) -> dict[str, float]:
    """Requests that come all at once."""
    seconds = contestant.worker().complete(prompts, SHORT_NEW).seconds
    new = len(prompts) * SHORT_NEW
    return {"total tok/s": (sum(map(len, prompts)) + new) / seconds, "new tok/s": new / seconds}


def prefix(contestant: Contestant, prompts: Prompts) -> dict[str, float]:
    """A prompt, then another that begins alike."""
    uncached, cached = (
        contestant.worker().complete([prompt], 1, cached=cached).first_seconds
        for prompt, cached in zip(prompts, (0, CACHED), strict=True)
    )
    return {"times faster": uncached / cached, "uncached s": uncached, "cached s": cached}


def start(contestant: Contestant, _: Prompts) -> dict[str, float]:
    """From a new process to the first token it prints."""
    begun = time.perf_counter()
    process = contestant.run_program(START[contestant.engine], str(contestant.model))
    assert process.stdout is not None
    byte = process.stdout.read(1)
    seconds = time.perf_counter() - begun
    process.communicate()
    if not byte or process.returncode:
        raise PeerFailed(f"its program ended with status {process.returncode}")
    return {"seconds": seconds}


def memory(contestant: Contestant, prompts: Prompts) -> dict[str, float]:
    """Peak of a new process that runs the streams, and what it is over a process that only imports the library."""
    worker = contestant.open(length=STREAM_PROMPT + STREAM_NEW)
    try:
        worker.complete(prompts, STREAM_NEW)
        peak = worker.peak_memory()
    finally:
        worker.close()
    code = f"import sys, {IMPORTS[contestant.engine]}; sys.path.append(sys.argv[1])\n"
    code += "from inference_peers import peak_memory; print(peak_memory())"
    program = contestant.run_program(code, str(Path(__file__).parent))
    base = int(program.communicate()[0])
    return {"over import MB": (peak - base) / 1e6, "peak MB": peak / 1e6}


def speculation(contestant: Contestant, prompts: Prompts) -> dict[str, float]:
    """A copy with one name changed, without and with n-gram drafts; greedy, so the tokens should be the same."""
    plain: Run = contestant.worker().complete(prompts, COPY_NEW)
    drafted: Run = contestant.worker(drafts=True).complete(prompts, COPY_NEW)
    same = next((i for i in range(COPY_NEW) if plain.tokens[0][i] != drafted.tokens[0][i]), COPY_NEW)
    return {
        "times faster": drafted.decode_rate / plain.decode_rate,
        "plain tok/s": plain.decode_rate,
        "drafts tok/s": drafted.decode_rate,
        "same tokens": same,
    }


@dataclass(frozen=True)
class Task:
    """One table.

    Attributes:
        what: its heading.
        measure: one turn of a contestant: figures by name, the one that is compared first.
        prompts: of a turn, the same for everyone.
        engines: that can do it.
        more_is_better: of the figure that is compared.
        rounds: at most so many; the figure hardly varies.
        limit: what of the machine bounds it: "bandwidth" or "matmul peak".
    """

    what: str
    measure: Callable[[Contestant, Prompts], dict[str, float]]
    prompts: Callable[[Texts], Prompts]
    engines: tuple[str, ...] = ("danlu", "llama.cpp", "openvino")
    more_is_better: bool = True
    rounds: int | None = None
    limit: str | None = None


EVERYONE = tuple(PEERS)


def alike(texts: Texts) -> Prompts:
    """Two prompts with the same first CACHED tokens."""
    shared = texts.take(CACHED)
    return [shared + texts.take(PROMPT - CACHED) for _ in range(2)]


TASKS = {
    "decode": Task(
        f"decode, one stream: {PROMPT} + {NEW} tokens", decode, lambda t: [t.take(PROMPT)], EVERYONE, limit="bandwidth"
    ),
    "prefill": Task(f"prefill of {PROMPT} tokens", prefill, lambda t: [t.take(PROMPT)], EVERYONE, limit="matmul peak"),
    "batch": Task(
        f"{STREAMS} requests at once: {SHORT_PROMPT} + {SHORT_NEW} tokens each",
        batch, lambda t: [t.take(SHORT_PROMPT) for _ in range(STREAMS)], EVERYONE,
    ),
    "prefix": Task(f"first token of {PROMPT} whose first {CACHED} are cached", prefix, alike),
    "start": Task('a new process to the first token after "Hi"', start, lambda t: [], more_is_better=False),
    "memory": Task(
        f"peak memory, {STREAMS} streams of {STREAM_PROMPT} + {STREAM_NEW} tokens",
        memory, lambda t: [t.take(STREAM_PROMPT) for _ in range(STREAMS)], more_is_better=False, rounds=1,
    ),
    "speculation": Task(
        f"n-gram drafts, a copy with one name changed: {COPY_NEW} tokens", speculation, lambda t: [t.copy_task()]
    ),
}  # fmt: skip
