"""Tool calls in what a model writes, told while they are written.

Formats, by what chat templates teach:

- hermes (Hermes, Qwen, danlu): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the answer.
- llama3: the answer is one such object (with ``parameters``), or several with semicolons between.
- mistral: the answer is a list of such objects, behind ``[TOOL_CALLS]``.

The marks of the latter two are special tokens in most vocabularies, which leave no text; so they may be missing. What
is no call of one of the tools is text.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator

from danlu.server.api.answer_parts import CallScanner, Part, Said, ToolCallArguments, ToolCallBegun, overlap
from danlu.server.protocol import ToolFormat
from danlu.tokenizer.special import TOOL_CALL

WHITE_SPACE = " \t\r\n"
MARKS = {"llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}

SEPARATORS = ",;"

ID_CHARS = {"mistral": 9}
"""Mistral's templates refuse ids of another length."""


def scanner_for(form: ToolFormat, names: Collection[str]) -> CallScanner:
    """What finds the calls in an answer.

    Args:
        names: of the tools that can be called.
    """
    if form == "hermes":
        return TaggedCalls(names)
    return BareCalls(names, MARKS[form], ID_CHARS.get(form))


class MalformedCall(Exception):
    """What was taken for a call is none.

    Attributes:
        taken: characters of the last piece of text that did look like a call.
    """

    taken = 0


class CallReader:
    """Reads the JSON object of one call, character by character.

    It is told when the name is complete and the arguments have begun (before that, it may turn out to be no call), the
    arguments as they come. Those written as a JSON string are unwrapped; missing ones are ``{}``. Inside of the
    arguments, only quotes and brackets are looked at.

    Args:
        call: which of the answer's calls.
        names: of the tools.
        id: of the call.
    """

    def __init__(self, call: int, names: Collection[str], id: str) -> None:
        self.raw = ""
        """What was read before the call was told."""
        self.begun = False
        """Whether it has been told."""
        self.done = False
        self._call, self._names, self._id = call, names, id
        self._name: str | None = None
        self._arguments: str | None = None  # those that were not told yet
        self._parts: list[Part] = []
        self._reading = self._object()
        next(self._reading)

    def push(self, text: str) -> int:
        """Read on; returns how many characters of the text belong to the call: all, unless it ends.

        Raises:
            MalformedCall: it is none.
        """
        for n, char in enumerate(text):
            try:
                self._reading.send(char)
            except StopIteration:
                self.done = True
                return n + 1
            except MalformedCall as error:
                error.taken = n
                raise
            if not self.begun:
                self.raw += char
        return len(text)

    def take(self) -> list[Part]:
        """What has become certain."""
        if self.begun and self._arguments:
            self._parts.append(ToolCallArguments(self._call, self._arguments))
            self._arguments = ""
        parts, self._parts = self._parts, []
        return parts

    def _object(self) -> Generator[None, str, None]:
        _require((yield from _skip()) == "{")
        char = yield from _skip()
        while char != "}":
            _require(char == '"')
            key = yield from _string()
            _require((yield from _skip()) == ":")
            char = yield from _skip()
            if key == "name":
                _require(char == '"' and self._name is None)
                self._name = yield from _string()
                _require(self._name in self._names)
                if self._arguments is not None:
                    self._begin()
                char = yield from _skip()
            elif key in ("arguments", "parameters"):
                _require(self._arguments is None)
                char = yield from self._read_arguments(char)
            else:
                _require(key in ("id", "type"))
                _require(char == '"')
                yield from _string()
                char = yield from _skip()
            if char == ",":
                char = yield from _skip()
                _require(char == '"')
            else:
                _require(char == "}")
        _require(self._name is not None)
        if self._arguments is None:
            self._add("{}")

    def _begin(self) -> None:
        if self._name is not None and not self.begun:
            self._parts.append(ToolCallBegun(self._call, self._id, self._name))
            self.begun = True

    def _read_arguments(self, char: str) -> Generator[None, str, str]:
        """Returns what follows them."""
        if char == "n":
            for expected in "ull":
                _require((yield) == expected)
            self._add("{}")
        elif char == '"':
            yield from self._unwrap()
        else:
            _require(char == "{")
            closing = ""
            while True:
                self._add(char)
                if char == '"':
                    yield from self._quoted()
                elif char in "{[":
                    closing += "}" if char == "{" else "]"
                elif char in "}]":
                    _require(char == closing[-1])
                    closing = closing[:-1]
                    if not closing:
                        break
                char = yield
        return (yield from _skip())

    def _quoted(self) -> Generator[None, str, None]:
        """A string within the arguments, as it is written."""
        char = ""
        while char != '"':
            char = yield
            self._add(char)
            if char == "\\":
                self._add((yield))

    def _unwrap(self) -> Generator[None, str, None]:
        """Arguments that are written as a string: its text."""
        begun = False
        while (piece := (yield from _character())) is not None:
            if begun or piece not in WHITE_SPACE:
                _require(begun or piece == "{")
                begun = True
                self._add(piece)
        if not begun:
            self._add("{}")

    def _add(self, text: str) -> None:
        self._arguments = (self._arguments or "") + text
        self._begin()


def _require(fine: bool) -> None:
    if not fine:
        raise MalformedCall


def _skip() -> Generator[None, str, str]:
    """The next character that is no white space."""
    while (char := (yield)) in WHITE_SPACE:
        pass
    return char


def _string() -> Generator[None, str, str]:
    """The rest of a string, behind its opening quote."""
    text = ""
    while (piece := (yield from _character())) is not None:
        text += piece
    return text


def _character() -> Generator[None, str, str | None]:
    """A character of a string, escaped or not; None: its closing quote."""
    char = yield
    if char == '"':
        return None
    if char != "\\":
        _require(char >= " ")
        return char
    escape = "\\" + (yield)
    if escape == "\\u":
        escape += yield from _hex()
        if escape[2].lower() == "d" and escape[3] in "89abAB":  # the first half of a pair
            _require((yield) == "\\" and (yield) == "u")
            escape += "\\u" + (yield from _hex())
    try:
        return str(json.loads(f'"{escape}"').encode().decode())  # half a pair is no text
    except ValueError:
        raise MalformedCall from None


def _hex() -> Generator[None, str, str]:
    digits = ""
    for _ in range(4):
        digits += yield
    return digits


class StepwiseScanner(ABC):
    """Holds text back until it is certain what it is."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Part]:
        """More of the answer."""
        self._held += text
        parts: list[Part] = []
        while self._held and (found := self._step()) is not None:
            parts += found
        return parts

    @abstractmethod
    def finish(self) -> list[Part]:
        """The answer has ended."""

    @abstractmethod
    def _step(self) -> list[Part] | None:
        """What comes next in what is held; None: that cannot be told yet."""


class TaggedCalls(StepwiseScanner):
    """Calls between ``<tool_call>`` and ``</tool_call>``. White space round them is no text."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._n_calls = 0
        self._gap = ""  # white space behind the last text
        self._reader: CallReader | None = None
        self._closing = False

    def finish(self) -> list[Part]:
        if self._reader is not None:
            return [] if self._reader.begun else [Said(self._gap + TOOL_CALL[0] + self._reader.raw)]
        held = "" if self._closing else self._held
        text = self._gap + held
        return [Said(text)] if held or (text and not self._n_calls) else []

    def _step(self) -> list[Part] | None:
        if self._reader is not None:
            return self._read(self._reader)
        if self._closing and not self._close():
            return None
        return self._look()

    def _look(self) -> list[Part] | None:
        opening = TOOL_CALL[0]
        text, found, rest = self._held.partition(opening)
        if not found:
            keep = overlap(text, opening)
            if keep == len(text):
                return None
            text, rest = text[: len(text) - keep], text[len(text) - keep :]
        else:
            self._reader = CallReader(self._n_calls, self._names, _call_id())
        self._held = rest
        return self._say(text)

    def _say(self, text: str) -> list[Part]:
        text = self._gap + text
        said = text.rstrip(WHITE_SPACE)
        self._gap = text[len(said) :]
        return [Said(said)] if said else []

    def _read(self, reader: CallReader) -> list[Part]:
        try:
            taken = reader.push(self._held)
        except MalformedCall as error:
            self._held = self._held[error.taken :]
            self._reader = None
            self._n_calls += reader.begun
            return reader.take() if reader.begun else self._say(TOOL_CALL[0] + reader.raw)
        self._held = self._held[taken:]
        if reader.begun:
            self._gap = ""
        if reader.done:
            self._reader, self._closing = None, True
            self._n_calls += 1
        return reader.take()

    def _close(self) -> bool:
        """Leave the closing tag behind, or do without; returns False where it may still come."""
        closing = TOOL_CALL[1]
        text = self._held.lstrip(WHITE_SPACE)
        if text.startswith(closing):
            self._held = text.removeprefix(closing)
        elif closing.startswith(text):
            return False
        self._closing = False
        return True


class BareCalls(StepwiseScanner):
    """Calls that are the whole answer: objects in a row, or a list of them.

    Args:
        mark: what may stand before them.
        id_chars: length of the ids; None: any.
    """

    def __init__(self, names: Collection[str], mark: str, id_chars: int | None = None) -> None:
        super().__init__()
        self._names, self._mark, self._id_chars = names, mark, id_chars
        self._n_calls = 0
        self._lead = ""  # what was skipped before the call that is read
        self._reader: CallReader | None = None
        self._plain = False

    def finish(self) -> list[Part]:
        text = self._held
        if self._reader is not None:
            text = "" if self._reader.begun else self._lead + self._reader.raw
        elif self._n_calls and not self._plain:
            text = text.strip(WHITE_SPACE + SEPARATORS + "]")
        return [Said(text)] if text else []

    def _step(self) -> list[Part] | None:
        if self._plain:
            text, self._held = self._held, ""
            return [Said(text)]
        if self._reader is not None:
            return self._read(self._reader)
        return self._look()

    def _look(self) -> list[Part] | None:
        if self._n_calls:
            text = self._held.lstrip(WHITE_SPACE + SEPARATORS)
            if text in ("", "]"):
                return None
        else:
            text = self._held.lstrip(WHITE_SPACE)
            if self._mark.startswith(text):
                return None
            text = text.removeprefix(self._mark).lstrip(WHITE_SPACE).removeprefix("[").lstrip(WHITE_SPACE)
            if not text:
                return None
        if text.startswith("{"):
            self._lead = self._held[: len(self._held) - len(text)]
            self._held = text
            self._reader = CallReader(self._n_calls, self._names, _call_id(self._id_chars))
        else:
            self._plain = True
        return []

    def _read(self, reader: CallReader) -> list[Part]:
        try:
            taken = reader.push(self._held)
        except MalformedCall as error:
            rest = self._held[error.taken :]
            self._held = rest if reader.begun else self._lead + reader.raw + rest
            self._reader, self._plain = None, True
            return reader.take()
        self._held = self._held[taken:]
        if reader.done:
            self._reader = None
            self._n_calls += 1
        return reader.take()


def _call_id(n_chars: int | None = None) -> str:
    return uuid.uuid4().hex[:n_chars] if n_chars else f"call_{uuid.uuid4().hex[:24]}"
