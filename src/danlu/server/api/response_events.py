"""The events of a response in OpenAI's Responses API, and the response that they add up to."""

from __future__ import annotations

import time
from typing import Any

from danlu.server.api.answer_parts import Reasoning, Said, ToolCallBegun
from danlu.server.api.response_items import ItemDict, new_id
from danlu.server.api.turn import TurnEvent
from danlu.server.protocol import TokenLogprob
from danlu.server.streaming import sse

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class ResponseWriter:
    """Turns the events of a turn into those of a response.

    Every method returns events as they are sent; each is written down at once, so that a later change of the response
    does not reach it.

    Args:
        response: as it is before anything was written; it is kept up to date.
        logprobs: texts come with the log probabilities of their tokens.

    Attributes:
        last: the number of the last event.
    """

    def __init__(self, response: dict[str, Any], *, logprobs: bool) -> None:
        self.response = response
        self.last = -1
        self._with_logprobs = logprobs
        self._logprobs: list[TokenLogprob] = []
        self._item: ItemDict | None = None
        self._call: int | None = None

    def begin(self) -> list[bytes]:
        """Work on the response begins."""
        return [self._event("response.created", response=self.response),
                self._event("response.in_progress", response=self.response)]  # fmt: skip

    def push(self, event: TurnEvent) -> list[bytes]:
        """The model went on."""
        self._logprobs += event.logprobs or []
        events: list[bytes] = []
        for part in event.parts:
            if isinstance(part, Reasoning):
                events += self._enter("reasoning")
                events += self._more("reasoning_text", part.text)
            elif isinstance(part, Said):
                events += self._enter("message")
                events += self._more("output_text", part.text)
            elif isinstance(part, ToolCallBegun):
                self._logprobs = []  # only texts have some
                events += self._leave("completed")
                events += self._add_call(part)
            else:
                self._logprobs = []
                assert self._item is not None
                assert part.call == self._call
                self._item["arguments"] += part.text
                events.append(self._of_item("response.function_call_arguments.delta", delta=part.text))
        return events

    def finish(self, status: str, usage: dict[str, Any] | None) -> list[bytes]:
        """The model has ended.

        Args:
            status: "completed"; "incomplete": it was cut off for its length.
        """
        events = []
        if status == "completed" and (self._item is None or self._item["type"] == "reasoning"):
            events += self._enter("message")  # a client that looks for the answer finds it, be it empty
        events += self._leave(status)
        self._end(status, usage)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._event(f"response.{status}", response=self.response)]

    def fail(self, message: str) -> list[bytes]:
        """The answer cannot be written to its end."""
        events = self._leave("incomplete")
        self._end("failed", None)
        self.response["error"] = {"code": "server_error", "message": message}
        return [*events, self._event("response.failed", response=self.response)]

    def cancel(self) -> None:
        """Nobody wants the rest. There is no event for that."""
        self._leave("incomplete")
        self._end("cancelled", None)

    def _end(self, status: str, usage: dict[str, Any] | None) -> None:
        self.response.update(status=status, usage=usage)
        if status == "completed":
            self.response["completed_at"] = int(time.time())

    # ---------------------------------------------------------------------------------------------- items

    def _enter(self, kind: str) -> list[bytes]:
        """Go on with an item of this kind, or begin one."""
        if self._item is not None and self._item["type"] == kind:
            return []
        events = self._leave("completed")
        if kind == "reasoning":
            item: ItemDict = {
                "id": new_id("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [],
                "status": "in_progress",
            }
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events.append(self._add(item))
        item["content"].append(part)
        return [*events, self._of_item("response.content_part.added", content_index=0, part=part)]

    def _add_call(self, begun: ToolCallBegun) -> list[bytes]:
        self._call = begun.call
        return [
            self._add(
                {"id": new_id("fc"), "type": "function_call", "call_id": begun.id, "name": begun.name, "arguments": "",
                 "status": "in_progress"}
            )
        ]  # fmt: skip

    def _add(self, item: ItemDict) -> bytes:
        self._item = item
        self.response["output"].append(item)
        return self._event("response.output_item.added", output_index=self._index, item=item)

    def _more(self, kind: str, text: str) -> list[bytes]:
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        fields: dict[str, Any] = {"content_index": 0, "delta": text}
        if kind == "output_text":
            told = [logprob_dict(one) for one in self._logprobs] if self._with_logprobs else []
            self._logprobs = []
            part["logprobs"] += told
            fields["logprobs"] = [_without_bytes(one) for one in told]
        return [self._of_item(f"response.{kind}.delta", **fields)]

    def _leave(self, status: str) -> list[bytes]:
        """The item is whole, or nothing more of it comes."""
        item = self._item
        if item is None:
            return []
        events = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._of_item("response.function_call_arguments.done", **done))
        else:
            part = item["content"][0]
            fields: dict[str, Any] = {"content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                fields["logprobs"] = [_without_bytes(one) for one in part["logprobs"]]
            events.append(self._of_item(f"response.{part['type']}.done", **fields))
            events.append(self._of_item("response.content_part.done", content_index=0, part=part))
        item["status"] = status
        events.append(self._event("response.output_item.done", output_index=self._index, item=item))
        self._item = self._call = None
        return events

    # ---------------------------------------------------------------------------------------------- events

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None
        return self._event(kind, output_index=self._index, item_id=self._item["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.last += 1
        return sse({"type": kind, "sequence_number": self.last, **fields}, kind)


def logprob_dict(one: TokenLogprob) -> dict[str, Any]:
    """A token as the API tells it."""
    others = [_token(text, logprob) for _, text, logprob in one.top]
    return {**_token(one.text, one.logprob), "top_logprobs": others}


def _token(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "bytes": list(text), "logprob": max(logprob, LOWEST_LOGPROB)}


def _without_bytes(one: dict[str, Any]) -> dict[str, Any]:
    """A token as events tell it."""
    others = [{"token": other["token"], "logprob": other["logprob"]} for other in one["top_logprobs"]]
    return {"token": one["token"], "logprob": one["logprob"], "top_logprobs": others}
