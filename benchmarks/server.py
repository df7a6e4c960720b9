"""Serving over HTTP beside the bare engine and other servers: `python benchmarks/server.py` (`pip install '.[bench]'`).

SmolLM2-135M-Instruct Q4_1, greedy, answers of one length, streamed from `/v1/chat/completions` to as many clients as
the task says, which ask all at once. `danlu` is `danlu serve`; `engine` is the same engine in a process of its own that
gets the same token ids, with no HTTP: what is lost in between is "overhead". Beside them, as far as they are installed
with what they need to serve, llama-cpp-python's server and `transformers serve` (with the weights in bf16). One JSON
line ends the output.

All are processes of their own, which are stopped while another is measured, and get the same prompts in the same round
(A B C A B C, median of the rounds). "danlu x" is how many times more tokens a second danlu makes than the row, the
median of the ratios within a round. Percentiles are over the answers of all rounds: the time to the first text, the
time between two pieces of text, the time of the whole answer. The client takes a part of the machine; the table shows
how much ("client cores").

`--soak SECONDS` has 64 clients ask for streams all the time, of which 20% go away, and tells of errors, of blocks of
the cache that are not given back, of memory, and of how fast /health/live answers.

Nothing else should run on the machine.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import comparison_parser, parse_comparison
from inference import installed
from inference_tasks import Texts
from inference_worker import PeerFailed, Worker
from server_client import Answer, RequestFailed, chat, send_all
from server_peers import PEERS, Server
from server_soak import soak

from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig
from danlu.tokenizer.tokenizer import Tokenizer

MAX_RUNNING = 64


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        clients: that ask at once.
        prompt: tokens of text in each question.
        new: tokens of each answer.
        others: other servers are measured too; they take long.
    """

    clients: int
    prompt: int
    new: int
    others: bool = True


TASKS = {"one": Task(1, 128, 128), "sixteen": Task(16, 128, 128), "many": Task(64, 64, 64, others=False)}


@dataclass
class Times:
    """Of answers, in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """One more answer."""
        at = answer.text_times()
        self.first.append(at[0] - answer.begun)
        self.gaps += [b - a for a, b in itertools.pairwise(at)]
        self.whole.append(answer.seconds)

    def percentiles(self) -> dict[str, float]:
        """Milliseconds."""
        named = {"first": self.first, "gap": self.gaps, "whole": self.whole}
        return {
            f"{name} p{percent}": 1e3 * sorted(found)[min(len(found) - 1, len(found) * percent // 100)]
            for name, found in named.items()
            if found
            for percent in (50, 99)
        }


class Engine:
    """The bare engine."""

    def __init__(self, model: Path, threads: int) -> None:
        settings = {"model": str(model), "threads": threads, "streams": MAX_RUNNING, "length": 2048, "drafts": False}
        self._worker, self._tokenizer = Worker("danlu", sys.executable, settings), Tokenizer.load(model)

    def measure(self, questions: list[str], n: int, times: Times) -> dict[str, float]:
        """Tokens a second."""
        prompts = [self._tokenizer.encode_chat(_messages(one), add_generation_prompt=True) for one in questions]
        run = self._worker.complete(prompts, n)
        return {"tokens/s": len(questions) * n / run.seconds}

    def close(self) -> None:
        """End it."""
        self._worker.close()


class Contestant:
    """A server."""

    def __init__(self, peer: str, python: str, model: Path, threads: int) -> None:
        self._server = Server(peer, python, model, threads)
        self.measure(["Hello"], 4, Times())  # what is made at the first request is not measured

    def measure(self, questions: list[str], n: int, times: Times) -> dict[str, float]:
        """Tokens a second and the client's share.

        Raises:
            PeerFailed: an answer is none.
        """
        requests = [chat(self._server.url, self._server.body(_messages(one), n)) for one in questions]
        tokens = 0
        try:
            with self._server.awake():
                busy, start = time.process_time(), time.perf_counter()
                answers = send_all(self._server.url, requests)
                seconds, busy = time.perf_counter() - start, time.process_time() - busy
            for answer in answers:
                tokens += _tokens(answer)
                times.add(answer)
        except (RequestFailed, OSError) as error:
            raise PeerFailed(f"{error}; the server's last words: {self._server.last_words()}") from error
        return {"tokens/s": tokens / seconds, "client cores": busy / seconds}

    def close(self) -> None:
        """End it."""
        self._server.close()


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _tokens(answer: Answer) -> int:
    """As the server tells, else a token for each piece of text."""
    events = answer.events(with_done=False)
    usages = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    texts = [choice["delta"].get("content") for event in events for choice in event["choices"]]
    return int(usages[-1]) if usages else sum(bool(text) for text in texts)


def measure(task: Task, contestants: dict[str, Any], questions: list[list[str]]) -> dict[str, dict[str, float]]:
    """Print and return the table of a task."""
    running = {name: one for name, one in contestants.items() if task.others or name in ("danlu", "engine")}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    times = {name: Times() for name in running}
    for asked in questions:
        for name, one in list(running.items()):
            try:
                rounds[name].append(one.measure(asked, task.new, times[name]))
            except PeerFailed as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                del running[name]
    if "danlu" not in running:
        raise SystemExit("danlu itself fails, see above")
    found = {}
    for name in running:
        row = {key: statistics.median(one[key] for one in rounds[name]) for key in rounds[name][0]}
        ratios = [a["tokens/s"] / b["tokens/s"] for a, b in zip(rounds["danlu"], rounds[name], strict=True)]
        row["danlu x"] = statistics.median(ratios)
        if name == "engine":
            row["overhead"] = 1 - row["danlu x"]
        found[name] = row | times[name].percentiles()
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    print(f"\n{task.clients} at once, {task.prompt} tokens of text, {task.new} new; times in ms")
    print(f"{'':14}" + "".join(f"{column:>14}" for column in columns))
    for name, row in found.items():
        print(f"{name:<14}" + "".join(f"{row[key]:14.4g}" if key in row else " " * 14 for key in columns))
    return found


def in_bf16(model: Path, folder: Path) -> Path:
    """A model as a folder that transformers opens."""
    return convert(ConvertConfig(source=model, out=folder / model.stem, dtype="bf16"))


def run_soak(model: Path, seconds: float, threads: int) -> dict[str, object]:
    """After a tenth of the time in which all is made that is made once."""
    server = Server("danlu", sys.executable, model, threads)
    try:
        with server.awake():
            soak(server.url, server.process, seconds / 10, seed=1)
            return soak(server.url, server.process, seconds).as_dict()
    finally:
        server.close()


def main() -> None:
    """Measure, print the tables and one JSON line."""
    parser = comparison_parser(
        __doc__, TASKS, PEERS, "--python", "the server of another environment: llama.cpp=/path/bin/python"
    )
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="many clients for so long, and nothing else")
    given = parse_comparison(parser, TASKS, PEERS)
    model, pythons = given.model, dict(given.elsewhere)
    result: dict[str, Any] = {
        "benchmark": "server", "model": model.name, "cpu": platform.machine(), "threads": given.threads,
    }  # fmt: skip
    if given.soak:
        result["soak"] = run_soak(model, given.soak, given.threads)
        print(json.dumps(result))
        return

    contestants: dict[str, Any] = {}
    versions: dict[str, str] = {}
    folder = tempfile.TemporaryDirectory()
    try:
        for name in dict.fromkeys(("danlu", *given.peers)):
            python = pythons.get(name, sys.executable)
            try:
                if (version := installed(python, PEERS[name].distribution)) is None:
                    raise PeerFailed("not installed")
                own = model if PEERS[name].opens_gguf else in_bf16(model, Path(folder.name))
                contestants[name], versions[name] = Contestant(name, python, own, given.threads), version
            except PeerFailed as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        contestants["engine"] = Engine(model, given.threads)
        tokenizer = Tokenizer.load(model)
        texts = Texts(tokenizer)
        result |= {"rounds": given.rounds, "versions": versions}
        for name in given.only:
            task = TASKS[name]
            asked = [
                [tokenizer.decode(texts.take(task.prompt)) for _ in range(task.clients)] for _ in range(given.rounds)
            ]
            result[name] = measure(task, contestants, asked)
    finally:
        for one in contestants.values():
            one.close()
        folder.cleanup()
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
