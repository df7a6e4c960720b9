"""A teacher behind an OpenAI-compatible API: asked in threads, again where it failed for now, and not believed to send
what it should."""

from __future__ import annotations

import email.utils
import json
import math
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.message import Message
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, Self
from urllib.parse import urlsplit

from danlu.errors import DanluError
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.jobs import Answer, Failure, Job
from danlu.posttraining.synth.teachers import Deliver

MAX_RESPONSE = 16 * 2**20
"""Bytes; no answer is as long."""
LONGEST_WAIT = 120.0
"""Seconds between two tries, whatever the endpoint asks for."""
FOR_NOW = frozenset({408, 409, 425, 429})
"""Status codes, beside 5xx, after which the same request may succeed."""
ABOUT_THE_ROW = frozenset({400, 413, 422})
"""Status codes that may be this request's own fault, such as a prompt that is too long."""


class TryAgain(Exception):
    """Failed for now.

    Attributes:
        wait: seconds that the endpoint asked to wait, where it did.
        unreachable: nobody was there.
    """

    def __init__(self, reason: str, *, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


class RowError(Exception):
    """Asking the same again will not help."""


class EndpointTeacher:
    """Answers from ``POST {url}/chat/completions``.

    Raises:
        DanluError: the environment variable with the key is not set.
    """

    def __init__(self, config: SynthConfig) -> None:
        self._config = config
        self._url = completions_url(config.teacher)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "danlu"}
        self._key = ""
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                what = "holds no key: control or other characters" if key else "is not set"
                raise DanluError(f"api_key_env: the environment variable {config.api_key_env} {what}")
            self._headers["Authorization"], self._key = f"Bearer {key}", key
        # A redirection would carry the key to who knows where.
        self._opener = urllib.request.build_opener(_NoRedirects)

    def answer(self, jobs: Sequence[Job], deliver: Deliver) -> None:
        """See :class:`~danlu.posttraining.synth.teachers.Teacher`."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        outcomes: queue.SimpleQueue[tuple[Job, Answer | Failure | BaseException]] = queue.SimpleQueue()
        ended = threading.Event()
        for job in jobs:
            waiting.put(job)

        def work() -> None:
            while not ended.is_set():
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    outcomes.put((job, self._patiently(job, ended)))
                except BaseException as error:  # handed to the caller, who would wait for ever otherwise
                    outcomes.put((job, error))

        # Daemons: who interrupts the run need not wait for requests that are under way.
        for _ in range(min(self._config.concurrency, len(jobs))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in jobs:
                job, outcome = outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                deliver(job, outcome)
        finally:
            ended.set()

    def _patiently(self, job: Job, ended: threading.Event) -> Answer | Failure:
        """Ask until there is an answer, or the tries are used up."""
        wait = self._config.retry_wait
        for attempt in range(self._config.retries + 1):
            try:
                return self._once(job)
            except RowError as error:
                return Failure(str(error))
            except TryAgain as error:
                last = error
                if attempt < self._config.retries:
                    asked = error.wait if error.wait is not None else 0.0
                    ended.wait(min(LONGEST_WAIT, max(asked, wait * random.uniform(0.75, 1.25))))
                    wait *= 2
            if ended.is_set():
                break
        tries = f" ({attempt + 1} tries)" if attempt else ""
        return Failure(f"{last}{tries}", last.unreachable)

    def _once(self, job: Job) -> Answer:
        request = urllib.request.Request(self._url, self._body(job), self._headers, method="POST")
        deadline = time.monotonic() + self._config.timeout
        try:
            with self._opener.open(request, timeout=self._config.timeout) as response:
                return read_answer(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise self._as_error(error, deadline) from error
        except (TimeoutError, HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise TryAgain(f"no answer within {self._config.timeout:g} seconds") from error
            told = str(reason) or type(reason).__name__
            unreachable = isinstance(error, urllib.error.URLError)
            raise TryAgain(f"{self._url}: {told}", unreachable=unreachable) from error

    def _body(self, job: Job) -> bytes:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": list(job.messages),
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_new_tokens,
            "seed": job.seed,
            **config.body,
        }
        return json.dumps({name: value for name, value in body.items() if value is not None}).encode()

    def _as_error(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        try:
            said, code = _message(_read(error, deadline))
        except (TimeoutError, HTTPException, OSError, TryAgain):
            said, code = "", ""
        told = f"{self._url}: {error.code} {error.reason}" + (f": {said}" if said else "")
        told = told.replace(self._key, "***") if self._key else told  # some tell what they were given
        if code == "insufficient_quota":
            return DanluError(f"{told}; the account has no credit left, which waiting does not mend")
        if error.code in FOR_NOW or error.code >= 500:
            return TryAgain(told, wait=retry_after(error.headers))
        if error.code in ABOUT_THE_ROW:
            return RowError(told)
        hint = "look at the URL of the teacher"
        if error.code in (401, 403):
            given = self._config.api_key_env
            hint = (
                f"look at the key in {given}" if given else "name the environment variable of a key with --api-key-env"
            )
        elif error.code == 404:
            hint = f"look at the URL, and whether it has a model {self._config.model!r}"
        return DanluError(f"{told}; {hint}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opener.close()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def completions_url(url: str) -> str:
    """Where chats are answered, of the address as people give it: with or without ``/v1`` and what follows."""
    url = url.rstrip("/").removesuffix("/chat/completions")
    return f"{url if urlsplit(url).path else f'{url}/v1'}/chat/completions"


def retry_after(headers: Message) -> float | None:
    """Seconds that a response asks to wait, said as such or as a date (RFC 9110, 10.2.3)."""
    said = headers.get("Retry-After", "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def read_answer(content: bytes) -> Answer:
    """The answer in the body of a response.

    Raises:
        TryAgain: the body is none that the API would send, as proxies' pages are.
        RowError: it is one, without an answer.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        page = content.lstrip()[:1] == b"<"
        raise TryAgain(f"the response is {'HTML' if page else 'no JSON'}: {_cut(content)!r}") from None
    if not isinstance(found, dict):
        raise TryAgain(f"the response is JSON without choices: {_cut(content)!r}")
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise TryAgain(f"the response has no choices: {_message(content)[0] or _cut(content)!r}")
    text, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning") or ""
    finish = choice.get("finish_reason")
    finish = finish if isinstance(finish, str) else "stop"
    if message.get("tool_calls"):
        raise RowError("the answer calls a tool, and there are none")
    if not isinstance(text, str) or not text.strip():
        if finish != "length":
            refused = message.get("refusal")
            raise RowError(f"the answer refuses: {refused}" if refused else "the answer is empty")
        text = ""
    if not isinstance(reasoning, str):
        raise RowError("the answer's reasoning is no text")
    try:
        f"{text}{reasoning}{finish}".encode()
    except UnicodeEncodeError:
        raise RowError("the answer holds half a surrogate pair") from None
    usage = found.get("usage")
    prompt_tokens, new_tokens = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, finish, prompt_tokens, new_tokens, reasoning)


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**40 else 0


def _read(response: Any, deadline: float) -> bytes:
    """The body, within the time and a size."""
    content = bytearray()
    while piece := response.read1(65536):
        content += piece
        if len(content) > MAX_RESPONSE:
            raise TryAgain(f"the response has more than {MAX_RESPONSE} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(content)


def _message(content: bytes) -> tuple[str, str]:
    """What the body of an error says, and its code, as OpenAI, vLLM, llama.cpp and FastAPI write them."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return "", ""
    error = found.get("error", found) if isinstance(found, dict) else None
    if isinstance(error, str):
        return error[:500], ""
    if not isinstance(error, dict):
        return "", ""
    said = error.get("message") or error.get("detail") or ""
    return str(said)[:500], str(error.get("code") or error.get("type") or "")


def _cut(content: bytes) -> str:
    return content[:80].decode("utf-8", "replace")
