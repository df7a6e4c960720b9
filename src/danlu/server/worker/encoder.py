"""Serves a model that embeds texts or compares pairs of them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from functools import partial
from typing import Any

from danlu.errors import DanluError
from danlu.server.protocol import ModelInfo, TextPrompt, unpack_prompt
from danlu.server.worker.encoders import EncoderModel, pack_vectors
from danlu.server.worker.link import Link
from danlu.server.worker.prompts import known


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
            case "load_adapter":
                raise DanluError(f"{message['folder']}: only models that write texts are served with adapters")
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
                return tokenizer.decode(known(tokenizer, message["ids"]))
            case "texts":
                return [tokenizer.decode_bytes([i]).decode("latin-1") for i in known(tokenizer, message["ids"])]
            case "check":
                return {}
        raise DanluError("model: this model embeds or compares texts and writes none; name another")
