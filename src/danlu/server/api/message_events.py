"""The events of a message in Anthropic's Messages API, and the message that they add up to."""

from __future__ import annotations

import json
from typing import Any

from danlu.server.api.answer_parts import Reasoning, Said, ToolCallBegun
from danlu.server.api.turn import TurnEvent
from danlu.server.streaming import sse


class MessageWriter:
    """Turns the events of a turn into those of a message.

    Every method returns events as they are sent.

    Args:
        message: as it is before anything was written; it is kept up to date.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        self._block: dict[str, Any] | None = None
        self._arguments = ""

    def begin(self) -> list[bytes]:
        """Work on the message begins."""
        return [_event("message_start", message=self.message), _event("ping")]

    def push(self, event: TurnEvent) -> list[bytes]:
        """The model went on."""
        events: list[bytes] = []
        for part in event.parts:
            if isinstance(part, Reasoning):
                events += self._enter({"type": "thinking", "thinking": "", "signature": ""})
                events.append(self._more("thinking", "thinking_delta", part.text))
            elif isinstance(part, Said):
                events += self._enter({"type": "text", "text": ""})
                events.append(self._more("text", "text_delta", part.text))
            elif isinstance(part, ToolCallBegun):
                events += self._leave()
                events += self._enter({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            else:
                self._arguments += part.text
                events.append(self._delta("input_json_delta", partial_json=part.text))
        return events

    def finish(self, stop_reason: str, stop_sequence: str | None, usage: dict[str, Any]) -> list[bytes]:
        """The model has ended."""
        events = self._leave()
        self.message.update(stop_reason=stop_reason, stop_sequence=stop_sequence, usage=usage)
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return [*events, _event("message_delta", delta=delta, usage=usage), _event("message_stop")]

    def _enter(self, block: dict[str, Any]) -> list[bytes]:
        """Go on with a block of this kind, or begin this one."""
        if self._block is not None and self._block["type"] == block["type"]:
            return []
        events = self._leave()
        self._block = block
        self.message["content"].append(block)
        return [*events, _event("content_block_start", index=self._index, content_block=block)]

    def _more(self, field: str, kind: str, text: str) -> bytes:
        assert self._block is not None
        self._block[field] += text
        return self._delta(kind, **{field: text})

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **fields})

    def _leave(self) -> list[bytes]:
        """The block is whole, or nothing more of it comes."""
        if self._block is None:
            return []
        if self._block["type"] == "tool_use":
            self._block["input"], self._arguments = _object(self._arguments), ""
        self._block = None
        return [_event("content_block_stop", index=self._index)]

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1


def _object(arguments: str) -> dict[str, Any]:
    """Arguments of a call. Those that ``max_tokens`` cut off are none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)
