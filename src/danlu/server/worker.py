"""The process of one model: requests come in over a socket, pieces of answers go out (see protocol.py).

The main thread runs the engine and nothing else. What takes time before a request can run (templates, tokens,
grammars) is done by other threads, so that it holds up no running answer. The process ends with its socket.

    python -m danlu.server.worker FD NAME SOURCE CONFIG
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu import config as configs
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.logprobs import TokenLogprobs
from danlu.engine.request import Event, Generation, Request, prompt_ids
from danlu.errors import DanluError
from danlu.hub.pull import model_path
from danlu.server.encoder_worker import WHOLE, EncoderModel, cosines, open_encoder, pack_vectors, texts_of
from danlu.server.protocol import (
    HEADER,
    ChatPrompt,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenLogprob,
    ToolFormat,
    pack,
    pack_logprobs,
    unpack_params,
    unpack_prompt,
)
from danlu.tokenizer.special import FIM, THINK
from danlu.tokenizer.tokenizer import Tokenizer

PR_SET_PDEATHSIG = 1

STATS_SECONDS = 0.25
"""The server hears how the engine is doing at most that often."""

FIM_TOKENS = (FIM[:3], ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), ("<|PREFIX|>", "<|MIDDLE|>", "<|SUFFIX|>"))
"""Prefix, middle and suffix, as families call them."""

NORMALIZED = 4
"""A tokenizer that normalizes text makes it shorter, by less than this."""

REASONING_OPTIONS = ("enable_thinking", "thinking", "reasoning_effort")
"""Variables by which chat templates switch reasoning."""


class Link:
    """The socket to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._incoming = connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; any thread may."""
        data = pack(message)
        with self._sending:
            try:
                self._connection.sendall(data)
            except OSError:
                os._exit(0)  # the server is gone

    def receive(self) -> dict[str, Any]:
        """The next message. The process ends where there is none."""
        header = self._incoming.read(HEADER.size)
        if len(header) < HEADER.size:
            os._exit(0)
        body = self._incoming.read(HEADER.unpack(header)[0])
        message: dict[str, Any] = json.loads(body)
        return message

    def answer(self, number: int, work: Callable[[], Any]) -> None:
        """Send what ``work`` returns, or why it does not."""
        try:
            result = work()
        except Exception as error:
            self.refuse(number, error)
        else:
            if result is not None:
                self.send({"id": number, "result": result})

    def refuse(self, number: int, error: Exception) -> None:
        """Say why there is no result."""
        user = isinstance(error, DanluError)
        self.send({"id": number, "error": str(error) if user else f"{type(error).__name__}: {error}", "user": user})


class GeneratorWorker:
    """Serves a language model through the engine."""

    def __init__(self, link: Link, name: str, path: Path, config: EngineConfig) -> None:
        self.link = link
        self.engine = Engine(path, config)
        assert self.engine.tokenizer is not None
        self.tokenizer: Tokenizer = self.engine.tokenizer
        self.info = _info(name, self.engine, self.tokenizer)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._longest_token = int(self.tokenizer.token_bytes().max())
        self._preparing = ThreadPoolExecutor(2, "prepare")
        self._gathers: dict[str, Gather] = {}
        self._stats_at = 0.0

    def take(self, message: dict[str, Any]) -> None:
        """A message has come (in the thread that receives them)."""
        op, number = message["op"], message["id"]
        if op == "abort":
            self._inbox.put(partial(self._abort, message["of"]))
        elif op == "check":
            self._inbox.put(partial(self.link.answer, number, self._check))
        else:
            work: Callable[[dict[str, Any]], Any] = {
                "generate": self._generate, "score": self._score, "embed": self._embed, "rank": self._rank,
                "tokenize": self._tokenize, "detokenize": self._detokenize, "texts": self._texts,
            }[op]  # fmt: skip
            self._preparing.submit(self.link.answer, number, partial(work, message))

    def run(self) -> None:
        """Step for ever."""
        engine = self.engine
        while True:
            if not engine.has_work:
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            if engine.has_work:
                self._tell(engine.step())

    # ---------------------------------------------------------------------------------------------- asked

    def _generate(self, message: dict[str, Any]) -> None:
        number, params = message["id"], unpack_params(message["params"])
        prompt = unpack_prompt(message["prompt"])
        is_chat = isinstance(prompt, ChatPrompt)
        which = "messages" if is_chat else "prompt"
        self._require_near_room(prompt, which)
        ids = self._ids(prompt)
        request = self.engine.prepare(ids, params, request_id=str(number), which=which)
        thinking = is_chat and self.tokenizer.decode(ids[-8:]).rstrip().endswith(THINK[0])

        def begin() -> None:
            self.link.send({"id": number, "result": {"prompt_tokens": len(ids), "thinking": thinking}})
            self.engine.enqueue(request)

        self._inbox.put(partial(self._guarded, number, begin))

    def _score(self, message: dict[str, Any]) -> None:
        params = unpack_params(message["params"])
        prompt = unpack_prompt(message["prompt"])
        self._require_near_room(prompt, "prompt")
        ids = self._ids(prompt)
        name = f"{message['id']}/0"
        self._gather(message["id"], [self.engine.prepare(ids, params, task="score", request_id=name, which="prompt")])

    def _embed(self, message: dict[str, Any]) -> None:
        inputs = message["inputs"]
        requests = self._embedding(message, inputs, [f"input.{number}" for number in range(len(inputs))])
        dimensions = message["dimensions"]
        self._gather(message["id"], requests, lambda vectors_nd: {"vectors": pack_vectors(vectors_nd, dimensions)})

    def _rank(self, message: dict[str, Any]) -> None:
        texts, places, whiches = texts_of([tuple(pair) for pair in message["pairs"]])
        requests = self._embedding(message, texts, whiches)
        self._gather(message["id"], requests, lambda vectors_nd: {"scores": cosines(vectors_nd, places)})

    def _embedding(
        self, message: dict[str, Any], inputs: Sequence[str | list[int]], whiches: Sequence[str]
    ) -> list[Request]:
        truncate = self.info.context if message["truncate"] == WHOLE else message["truncate"]
        requests = []
        for number, (text, which) in enumerate(zip(inputs, whiches, strict=True)):
            ids = prompt_ids(self.tokenizer, text)[:truncate]
            name = f"{message['id']}/{number}"
            requests.append(self.engine.prepare(ids, task="embed", request_id=name, which=which))
        return requests

    def _gather(self, number: int, requests: list[Request], embedded: Embedded | None = None) -> None:
        gather = Gather(number, len(requests), embedded)

        def begin() -> None:
            for request in requests:
                self._gathers[request.id] = gather
                self.engine.enqueue(request)

        self._inbox.put(partial(self._guarded, number, begin))

    def _tokenize(self, message: dict[str, Any]) -> list[int]:
        return self._ids(unpack_prompt(message["prompt"]))

    def _detokenize(self, message: dict[str, Any]) -> str:
        return self.tokenizer.decode(_known(self.tokenizer, message["ids"]))

    def _texts(self, message: dict[str, Any]) -> list[str]:
        return [self._bytes(i).decode("latin-1") for i in _known(self.tokenizer, message["ids"])]

    def _require_near_room(self, prompt: Prompt, which: str) -> None:
        """Refuse at once what cannot fit by far: splitting megabytes into tokens takes up to a minute."""
        match prompt:
            case ChatPrompt():
                size = sum(len(text) for one in prompt.messages if isinstance(text := one.get("content"), str))
            case TextPrompt():
                size = len(prompt.text)
            case _:
                return
        if size > NORMALIZED * self._longest_token * self.info.context:
            raise DanluError(
                f"{which}: has {size} characters, far more than the model's context of {self.info.context} tokens; "
                "shorten it"
            )

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return self._chat_ids(prompt)
        if isinstance(prompt, TextPrompt):
            return self._text_ids(prompt)
        return prompt.ids

    def _chat_ids(self, prompt: ChatPrompt) -> list[int]:
        if not self.info.chat:
            raise DanluError("messages: this model has no chat template; use /v1/completions")
        messages, begun = prompt.messages, ""
        if prompt.continue_last:
            messages, begun = messages[:-1], messages[-1].get("content") or ""
        ids = self.tokenizer.encode_chat(
            messages,
            add_generation_prompt=prompt.generation_prompt,
            tools=prompt.tools,
            template_options=prompt.template_options,
        )
        return ids + self.tokenizer.encode(begun) if begun else ids

    def _text_ids(self, prompt: TextPrompt) -> list[int]:
        if not prompt.special_tokens:
            return self.tokenizer.encode(prompt.text)
        if prompt.suffix is None:
            return prompt_ids(self.tokenizer, prompt.text)
        tokens = _fim_tokens(self.tokenizer)
        if tokens is None:
            raise DanluError("suffix: this model's tokenizer has no tokens for filling a gap; leave it out")
        prefix, middle, suffix = map(self.tokenizer.id_of, tokens)
        begin = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        encode = self.tokenizer.encode
        return [*begin, prefix, *encode(prompt.text), suffix, *encode(prompt.suffix), middle]

    def _guarded(self, number: int, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.link.refuse(number, error)

    def _abort(self, number: int) -> None:
        self.engine.abort(str(number))
        for name in [name for name, gather in self._gathers.items() if gather.number == number]:
            self.engine.abort(name)

    def _check(self) -> dict[str, Any]:
        self.engine.check()
        return self._stats()

    # ---------------------------------------------------------------------------------------------- told

    def _tell(self, events: list[Event]) -> None:
        pieces = []
        for event in events:
            gather = self._gathers.get(event.request_id)
            if gather is None:
                pieces.append(self._piece(event))
            elif event.generation is not None:
                del self._gathers[event.request_id]
                gather.add(int(event.request_id.partition("/")[2]), event.generation)
                if gather.whole:
                    self.link.answer(gather.number, partial(self._gathered, gather))
        message: dict[str, Any] = {}
        if pieces:
            message["pieces"] = pieces
        now = time.perf_counter()
        if now - self._stats_at > STATS_SECONDS or not self.engine.has_work:
            self._stats_at = now
            message["stats"] = self._stats()
        if message:
            self.link.send(message)

    def _piece(self, event: Event) -> list[Any]:
        logprobs = None if event.logprobs is None else self._logprobs(event.logprobs)
        end: dict[str, Any] | None = None
        if (generation := event.generation) is not None:
            stats = generation.stats
            end = {
                "cached_tokens": stats.cached_tokens,
                "completion_tokens": stats.new_tokens,
                "queued_seconds": stats.queued_seconds,
                "first_token_seconds": stats.first_token_seconds,
                "total_seconds": stats.total_seconds,
                "error": generation.error,
            }
            if generation.prompt_logprobs is not None:
                end["prompt_logprobs"] = self._logprobs(generation.prompt_logprobs)
        return [
            int(event.request_id), event.index, event.text, event.token_ids, logprobs, event.finish_reason,
            event.stop_text, end,
        ]  # fmt: skip

    def _gathered(self, gather: Gather) -> dict[str, Any]:
        found = gather.found
        for generation in found:
            if generation.error is not None or generation.completions[0].finish_reason == "abort":
                raise RuntimeError(generation.error or "aborted")
        result: dict[str, Any] = {"prompt_tokens": sum(len(generation.prompt_ids) for generation in found)}
        if gather.embedded is not None:
            vectors_nd = torch.stack([one.embedding for one in found if one.embedding is not None]).float()
            result |= gather.embedded(torch.nn.functional.normalize(vectors_nd, dim=-1))
        else:
            result["logprobs"] = self._logprobs(found[0].prompt_logprobs or [])
            result["ids"] = found[0].prompt_ids
        return result

    def _logprobs(self, logprobs: Sequence[TokenLogprobs | None]) -> list[Any]:
        return pack_logprobs([None if one is None else self._spelled(one) for one in logprobs])

    def _spelled(self, one: TokenLogprobs) -> TokenLogprob:
        top = [(i, self._bytes(i), logprob) for i, logprob in one.top]
        return TokenLogprob(one.token_id, self._bytes(one.token_id), one.logprob, top)

    def _bytes(self, token_id: int) -> bytes:
        """A token as it is shown: special ones by their names."""
        if token_id >= self.tokenizer.vocab_size:  # a row of the head that no token uses
            return b""
        if self.tokenizer.is_special(token_id):
            return self.tokenizer.decode([token_id]).encode()
        return self.tokenizer.decode_bytes([token_id])

    def _stats(self) -> dict[str, Any]:
        return dataclasses.asdict(self.engine.stats)


Embedded = Callable[[Tensor], dict[str, Any]]


class Gather:
    """Requests whose results are one answer.

    Attributes:
        embedded: what the answer holds of the vectors, where they are embedded.
    """

    def __init__(self, number: int, n: int, embedded: Embedded | None) -> None:
        self.number, self.embedded = number, embedded
        self._found: list[Generation | None] = [None] * n

    def add(self, index: int, generation: Generation) -> None:
        """One of them has ended."""
        self._found[index] = generation

    @property
    def whole(self) -> bool:
        """All have."""
        return all(generation is not None for generation in self._found)

    @property
    def found(self) -> list[Generation]:
        """Their ends, in order."""
        return [generation for generation in self._found if generation is not None]


class EncoderWorker:
    """Serves a model that embeds texts or compares pairs of them."""

    def __init__(self, link: Link, name: str, model: EncoderModel) -> None:
        self.link, self.model = link, model
        sizes = model.info()
        self.info = ModelInfo(name, model.kind, sizes["context"], sizes["vocab_size"], sizes["dim"])
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: set[int] = set()

    def take(self, message: dict[str, Any]) -> None:
        """A message has come."""
        if message["op"] == "abort":
            self._waiting.discard(message["of"])
        else:
            self._waiting.add(message["id"])
            self._inbox.put(partial(self._answer, message))

    def run(self) -> None:
        """Answer one after the other, for ever."""
        while True:
            self._inbox.get()()

    def _answer(self, message: dict[str, Any]) -> None:
        if message["id"] in self._waiting:  # nobody has stopped to wait
            self.link.answer(message["id"], partial(self._work, message))
            self._waiting.discard(message["id"])

    def _work(self, message: dict[str, Any]) -> Any:
        tokenizer = self.model.tokenizer
        match message["op"]:
            case "embed":
                vectors_nd, n_tokens = self.model.embed(message["inputs"], message["truncate"])
                return {"vectors": pack_vectors(vectors_nd, message["dimensions"]), "prompt_tokens": n_tokens}
            case "rank":
                scores, n_tokens = self.model.similarity(
                    [tuple(pair) for pair in message["pairs"]], message["truncate"]
                )
                return {"scores": scores, "prompt_tokens": n_tokens}
            case "tokenize":
                prompt = unpack_prompt(message["prompt"])
                if not isinstance(prompt, TextPrompt):
                    raise DanluError("messages: this model is no chat model; give a prompt")
                return self.model.tokenize(prompt.text, prompt.special_tokens)
            case "detokenize":
                return tokenizer.decode(_known(tokenizer, message["ids"]))
            case "texts":
                return [tokenizer.decode_bytes([i]).decode("latin-1") for i in _known(tokenizer, message["ids"])]
            case "check":
                return {}
        raise DanluError("model: this model embeds or compares texts and writes none; name another")


def main() -> None:
    """Open the model and serve it until the socket closes."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # the server tells when to end, by closing the socket
        signal.signal(signal_number, signal.SIG_IGN)
    if sys.platform == "linux":  # the socket tells too, but not to a process that is busy or was stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    fd, name, source, options = sys.argv[1:]
    link = Link(socket.socket(fileno=int(fd)))
    incoming: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    worker: GeneratorWorker | EncoderWorker | None = None

    def receive() -> None:
        while True:
            message = link.receive()
            if worker is None:
                incoming.put(message)
            else:
                worker.take(message)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    try:
        path = model_path(source)
        if (encoder := open_encoder(path)) is not None:
            worker = EncoderWorker(link, name, encoder)
        else:
            worker = GeneratorWorker(link, name, path, configs.load(EngineConfig, values=json.loads(options)))
    except (DanluError, OSError, MemoryError) as error:
        link.refuse(0, error if isinstance(error, DanluError) else DanluError(f"{source}: {error}"))
        os._exit(1)
    link.send({"id": 0, "result": dataclasses.asdict(worker.info)})
    worker.run()


def _info(name: str, engine: Engine, tokenizer: Tokenizer) -> ModelInfo:
    shape = engine.runner.config
    template = str(tokenizer.config.get("chat_template") or "")
    formats: dict[ToolFormat, str] = {"mistral": "[TOOL_CALLS]", "llama3": "<|python_tag|>"}
    return ModelInfo(
        name=name,
        kind="generate",
        context=engine.max_len,
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        chat=bool(template),
        fills_middle=_fim_tokens(tokenizer) is not None,
        thinks="reasoning_content" in template or "thinking" in template,
        template_has_tools=re.search(r"\btools\b", template) is not None,
        template_options=tuple(o for o in REASONING_OPTIONS if re.search(rf"\b{o}\b", template)),
        tool_format=next((form for form, mark in formats.items() if mark in template), "hermes"),
        kernels=getattr(engine.runner, "path", None) or "torch",
    )


def _known(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Token ids, all of them of the vocabulary."""
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise DanluError(f"tokens: has ids outside the vocabulary of {tokenizer.vocab_size}; use the model's tokenizer")
    return ids


def _fim_tokens(tokenizer: Tokenizer) -> tuple[str, ...] | None:
    for tokens in FIM_TOKENS:
        try:
            if all(tokenizer.is_special(tokenizer.id_of(token)) for token in tokens):
                return tokens
        except DanluError:
            continue
    return None


if __name__ == "__main__":
    main()
