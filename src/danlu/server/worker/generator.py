"""Serves a language model: the engine in the main thread; what comes before a request can run, in others."""

from __future__ import annotations

import dataclasses
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.logprobs import TokenLogprobs
from danlu.engine.request import Event, Generation, Request, prompt_ids
from danlu.server.protocol import (
    ChatPrompt,
    ModelInfo,
    TokenLogprob,
    ToolFormat,
    pack_logprobs,
    unpack_params,
    unpack_prompt,
)
from danlu.server.worker.encoders import WHOLE, cosines, pack_vectors, texts_of
from danlu.server.worker.link import Link
from danlu.server.worker.prompts import PromptReader, known
from danlu.tokenizer.definition import TOKENIZER
from danlu.tokenizer.special import THINK
from danlu.tokenizer.tokenizer import Tokenizer

STATS_SECONDS = 0.25
"""The server hears how the engine is doing at most that often."""

REASONING_OPTIONS = ("enable_thinking", "thinking", "reasoning_effort")
"""Variables by which chat templates switch reasoning."""

TOOL_MARKS: dict[ToolFormat, str] = {
    "mistral": r"\[TOOL_CALLS\]",
    "llama3": r"<\|python_tag\|>|\"parameters\": dictionary",
}
"""What the templates say of models that write tool calls otherwise than Hermes does."""


class GeneratorWorker:
    """Serves a language model through the engine."""

    def __init__(self, link: Link, name: str, path: Path, config: EngineConfig) -> None:
        self.link = link
        self.engine = Engine(path, config)
        assert self.engine.tokenizer is not None
        self.tokenizer: Tokenizer = self.engine.tokenizer
        self._readers: dict[str | None, PromptReader] = {
            None: PromptReader(self.tokenizer, for_encoder=self.engine.has_encoder)
        }
        self.info = _info(name, self.engine, self._readers[None])
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._preparing = ThreadPoolExecutor(2, "prepare")
        self._loading = threading.Lock()  # one adapter at a time
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
                "load_adapter": self._load_adapter,
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
        number, params, adapter = message["id"], unpack_params(message["params"]), message.get("adapter")
        prompt, reader = unpack_prompt(message["prompt"]), self._readers[adapter]
        is_chat = isinstance(prompt, ChatPrompt)
        which = "messages" if is_chat else "prompt"
        reader.require_near_room(prompt, which, self.info.context)
        ids = reader.ids(prompt)
        own = set(reader.tokenizer.stop_ids) - set(self.tokenizer.stop_ids)
        params = dataclasses.replace(params, stop_ids=(*params.stop_ids, *sorted(own)))
        request = self.engine.prepare(ids, params, request_id=str(number), adapter=adapter, which=which)
        thinking = is_chat and self.tokenizer.decode(ids[-8:]).rstrip().endswith(THINK[0])

        def begin() -> None:
            self.link.send({"id": number, "result": {"prompt_tokens": len(ids), "thinking": thinking}})
            self.engine.enqueue(request)

        self._inbox.put(partial(self._guarded, number, begin))

    def _score(self, message: dict[str, Any]) -> None:
        params = unpack_params(message["params"])
        prompt, adapter = unpack_prompt(message["prompt"]), message.get("adapter")
        self._readers[adapter].require_near_room(prompt, "prompt", self.info.context)
        ids = self._readers[adapter].ids(prompt)
        request = self.engine.prepare(
            ids, params, task="score", request_id=f"{message['id']}/0", adapter=adapter, which="prompt"
        )
        self._gather(message["id"], [request])

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
            request = self.engine.prepare(
                ids,
                task="embed",
                request_id=f"{message['id']}/{number}",
                adapter=message.get("adapter"),
                which=which,
            )
            requests.append(request)
        return requests

    def _gather(self, number: int, requests: list[Request], embedded: Embedded | None = None) -> None:
        gather = Gather(number, len(requests), embedded)

        def begin() -> None:
            for request in requests:
                self._gathers[request.id] = gather
                self.engine.enqueue(request)

        self._inbox.put(partial(self._guarded, number, begin))

    def _tokenize(self, message: dict[str, Any]) -> list[int]:
        return self._readers[message.get("adapter")].ids(unpack_prompt(message["prompt"]))

    def _detokenize(self, message: dict[str, Any]) -> str:
        return self.tokenizer.decode(known(self.tokenizer, message["ids"]))

    def _texts(self, message: dict[str, Any]) -> list[str]:
        return [self._bytes(i).decode("latin-1") for i in known(self.tokenizer, message["ids"])]

    def _load_adapter(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the adapter is, once it is loaded. If it has a tokenizer, that one's chat template and end hold for its
        requests; the tokens are the model's."""
        name, folder = message["adapter"], Path(message["folder"])
        reader = self._readers[None]
        if (folder / TOKENIZER).is_file():
            own = Tokenizer.load(folder).config
            changed = {key: own[key] for key in ("chat_template", "eos_token") if own.get(key)}
            config = {**self.tokenizer.config, **changed}
            reader = PromptReader(Tokenizer(self.tokenizer.definition, config, folder))
        with self._loading:
            self.engine.load_adapter(name, folder)
        self._readers[name] = reader
        return dataclasses.asdict(_info(name, self.engine, reader))

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


def _info(name: str, engine: Engine, prompts: PromptReader) -> ModelInfo:
    shape = engine.runner.config
    template = prompts.template
    return ModelInfo(
        name=name,
        kind="generate",
        context=engine.max_len,
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        chat=bool(template),
        fills_middle=prompts.gap_tokens is not None,
        thinks="reasoning_content" in template or "thinking" in template,
        template_has_tools=re.search(r"\btools\b", template) is not None,
        template_options=tuple(o for o in REASONING_OPTIONS if re.search(rf"\b{o}\b", template)),
        tool_format=next((form for form, mark in TOOL_MARKS.items() if re.search(mark, template)), "hermes"),
        kernels=getattr(engine.runner, "path", None) or "torch",
    )
