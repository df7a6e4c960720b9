"""One turn of a chat, whatever API it was asked through: conversation and rules for the answer in, parts out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request

from danlu.engine.config import SamplingParams
from danlu.server.api.answer_parts import AnswerParser, Part, Reasoning, Said, ToolCallArguments, ToolCallBegun
from danlu.server.api.chat_prompt import for_template
from danlu.server.api.tool_calls import scanner_for
from danlu.server.api.tool_grammar import MOST_CALLS, answer_grammar, forced_calls, json_rule, strict_calls
from danlu.server.errors import ApiError
from danlu.server.protocol import ChatPrompt, ModelInfo, Piece, TokenLogprob
from danlu.tokenizer.special import THINK

if TYPE_CHECKING:
    from danlu.server.answer import Answer
    from danlu.server.serving import Serving


@dataclass(frozen=True)
class Named:
    """The one tool that is to be called."""

    name: str


@dataclass(frozen=True)
class JsonObject:
    """The answer is a JSON object."""


@dataclass(frozen=True)
class JsonSchema:
    """The answer is JSON of a schema, which is followed whether or not it is strict."""

    schema: dict[str, Any]
    strict: bool = True


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


@dataclass(frozen=True)
class Turn:
    """What is asked for.

    Attributes:
        model: None: the first one served.
        messages: OpenAI's message dicts, their contents as text.
        tools: as ``{"type": "function", "function": {"name", "description", "parameters", "strict"}}``.
        tool_choice: "none": tools are in the prompt, but what looks like a call is text.
        structure: of the answer's text.
        names: options of the engine, and tools, tool_choice, structure, effort, template_options and messages -> fields
            of the API, for messages.
        template_options: further variables of the chat template.
        effort: how much the model is to think; None: as it does by itself.
        continue_last: the last message is the beginning of the answer.
    """

    messages: list[dict[str, Any]]
    model: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | Named = "auto"
    parallel_tool_calls: bool = True
    structure: JsonObject | JsonSchema | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    names: Mapping[str, str] = field(default_factory=dict)
    template_options: dict[str, Any] = field(default_factory=dict)
    effort: Effort | None = None
    continue_last: bool = False

    def refused(self, name: str, message: str) -> ApiError:
        """What is wrong with one of the attributes."""
        param = self.names.get(name, name)
        return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """News of one answer; its last event has a finish_reason.

    Attributes:
        logprobs: of the tokens of the answer, calls included; those of its thoughts are left out.
        stop_text: the stop string that ended it.
    """

    index: int
    parts: list[Part]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_text: str | None = None


class TurnStream:
    """The events of a turn: iterate over it once.

    Attributes:
        answer: has the id, the counts of tokens, the timings.
    """

    def __init__(self, answer: Answer, turn: Turn, info: ModelInfo) -> None:
        self.answer = answer
        self._turn, self._info = turn, info
        self._lines: dict[int, _Line] = {}

    async def __aiter__(self) -> AsyncIterator[TurnEvent]:
        """
        Raises:
            ApiError: the answer cannot be brought to its end.
        """
        async for piece in self.answer:
            line = self._lines.get(piece.index)
            if line is None:
                line = self._lines[piece.index] = self._begun()
            event = line.read(piece)
            if event is not None:
                yield event

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of all thoughts so far."""
        return sum(line.reasoning_tokens for line in self._lines.values())

    def _begun(self) -> _Line:
        turn = self._turn
        thinking = self.answer.thinking or (turn.continue_last and _in_thought(turn.messages[-1]["content"]))
        calls = None
        if turn.tools and turn.tool_choice != "none":
            calls = scanner_for(self._info.tool_format, [tool["function"]["name"] for tool in turn.tools])
        return _Line(AnswerParser(thinking=thinking, calls=calls), only_one_call=not turn.parallel_tool_calls)


class _Line:
    """One of the answers."""

    def __init__(self, parser: AnswerParser, only_one_call: bool) -> None:
        self.reasoning_tokens = 0
        self._parser, self._only_one_call = parser, only_one_call
        self._undecided: list[TokenLogprob] = []
        self._called = False

    def read(self, piece: Piece) -> TurnEvent | None:
        """What a piece tells; None: nothing yet."""
        thinking = self._parser.answering is False
        parts = self._parser.push(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            parts += self._parser.finish()
        if thinking or self._parser.answering is False:
            self.reasoning_tokens += len(piece.token_ids)
        parts = [part for part in parts if not self._left_out(part)]
        self._called = self._called or any(isinstance(part, ToolCallBegun) for part in parts)
        logprobs = self._logprobs(piece, thinking, parts)
        if not (parts or logprobs or piece.finish_reason):
            return None
        return TurnEvent(piece.index, parts, logprobs, self._finish_reason(piece), piece.stop_text)

    def _left_out(self, part: Part) -> bool:
        """Whether it belongs to a call beside the one that is wanted."""
        return self._only_one_call and isinstance(part, ToolCallBegun | ToolCallArguments) and part.call > 0

    def _logprobs(self, piece: Piece, thinking: bool, parts: list[Part]) -> list[TokenLogprob] | None:
        if piece.logprobs is None:
            return None
        answering = self._parser.answering
        if answering is None and piece.finish_reason is None:
            self._undecided += piece.logprobs
            return []
        found = [*self._undecided, *piece.logprobs]
        self._undecided = []
        # A piece that ends a thought may hold the beginning of the answer; the tokens of both are told.
        thought = answering is False or (thinking and not any(isinstance(part, Said) for part in parts))
        return [] if thought else found

    def _finish_reason(self, piece: Piece) -> FinishReason | None:
        match piece.finish_reason:
            case "abort" | "error":
                raise ApiError(500, "the answer was broken off", code="model_failed")
            case "stop" if self._called:
                return "tool_calls"
            case reason:
                return reason


@dataclass
class Call:
    """A tool call; ``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Told:
    """One whole answer."""

    reasoning: str = ""
    text: str = ""
    tool_calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason = "stop"
    stop_text: str | None = None

    def add(self, event: TurnEvent) -> None:
        """Take an event in."""
        for part in event.parts:
            match part:
                case Said(text):
                    self.text += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCallBegun(_, id, name):
                    self.tool_calls.append(Call(id, name))
                case ToolCallArguments(call, text):
                    self.tool_calls[call].arguments += text
        if event.logprobs is not None:
            self.logprobs = (self.logprobs or []) + event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.stop_text = event.finish_reason, event.stop_text


async def whole(stream: TurnStream) -> list[Told]:
    """All answers of a turn, for those that are not streamed.

    Raises:
        ApiError: they cannot be brought to their end.
    """
    told: dict[int, Told] = {}
    async for event in stream:
        told.setdefault(event.index, Told()).add(event)
    return [told[index] for index in sorted(told)]


@contextlib.asynccontextmanager
async def open_turn(serving: Serving, request: Request, turn: Turn) -> AsyncIterator[TurnStream]:
    """Have a turn answered. Who leaves the block aborts what still runs.

    Raises:
        ApiError: it cannot be answered, or not now; the message names the field of the API.
    """
    info = await serving.info(request, turn.model)
    turn = dataclasses.replace(turn, names=_names(turn), template_options=_template_options(turn, info))
    prompt = prompt_of(turn, info)
    opened = _constrained(turn) and info.thinks and await _opens_thought(serving, request, turn, prompt)
    params = _params(turn, info, opened)
    names = {
        option: name for option, name in turn.names.items() if option not in ("structure", "effort")
    }  # plain words
    async with serving.generate(request, turn.model, prompt, params, names=names) as answer:
        yield TurnStream(answer, turn, info)


async def count_tokens(serving: Serving, request: Request, turn: Turn) -> int:
    """Tokens of what the model reads.

    Raises:
        ApiError: the turn cannot be answered.
    """
    info = await serving.info(request, turn.model)
    turn = dataclasses.replace(turn, template_options=_template_options(turn, info))
    return len(await serving.tokenize(request, turn.model, prompt_of(turn, info)))


def prompt_of(turn: Turn, info: ModelInfo) -> ChatPrompt:
    """What the model reads, which is also what counting its tokens counts."""
    if info.kind == "generate" and not info.chat:
        raise ApiError(
            400, f"model: {info.name!r} has no chat template; use /v1/completions", param="model", code="wrong_model"
        )
    if turn.continue_last:
        last = turn.messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls") or last.get("reasoning_content"):
            message = "the last message can be continued only if it is the assistant's and has nothing but content"
            raise turn.refused("continue_last", message)
    messages, tools = for_template(turn.messages, turn.tools, info)
    return ChatPrompt(messages, tools, turn.template_options, turn.continue_last)


def _names(turn: Turn) -> dict[str, str]:
    """Fields of the API, also for the options that make the model follow a schema."""
    calls = turn.names.get("tools", "tools")
    structure = turn.names.get("structure", "response_format")
    own: dict[str, str] = {}
    if turn.params.structure is None:
        own = {"json_schema": structure if turn.structure is not None else calls}
        own["grammar"] = own["json_schema"] if not turn.tools or turn.tool_choice == "none" else calls
    return {**turn.names, **own}


def _template_options(turn: Turn, info: ModelInfo) -> dict[str, Any]:
    """Those asked for, with what makes the model think as much as it is to."""
    effort, reads = turn.effort, info.template_options
    if effort is None:
        return turn.template_options
    if "reasoning_effort" in reads:
        option: dict[str, Any] = {"reasoning_effort": effort}
    elif effort in ("none", "minimal") and (switch := next(iter(reads), None)) is not None:
        option = {switch: False}
    elif effort == "none" and not reads and not info.thinks:
        option = {}
    else:
        can = ", or choose none: this model's thoughts can be switched off" if reads else ""
        raise turn.refused("effort", f"{effort!r} is not in the power of this model's chat template; leave it out{can}")
    return turn.template_options | option


def _constrained(turn: Turn) -> bool:
    return turn.structure is not None or turn.params.structure is not None or _forced(turn)


def _forced(turn: Turn) -> bool:
    """Whether the answer has to be a tool call."""
    return bool(turn.tools) and (turn.tool_choice == "required" or isinstance(turn.tool_choice, Named))


async def _opens_thought(serving: Serving, request: Request, turn: Turn, prompt: ChatPrompt) -> bool:
    """Whether the prompt ends inside a thought: the structure then begins behind it."""
    ids = await serving.tokenize(request, turn.model, prompt)
    return _in_thought(await serving.detokenize(request, turn.model, ids[-8:]))


def _in_thought(text: str) -> bool:
    return text.rfind(THINK[0]) > text.rfind(THINK[1])


def _params(turn: Turn, info: ModelInfo, opened: bool) -> SamplingParams:
    """How the model decodes, tools and structure included.

    Args:
        opened: the prompt ends inside a thought.
    """
    params, form = turn.params, info.tool_format
    callable_tools = turn.tools if turn.tool_choice != "none" else []
    strict = next((i for i, tool in enumerate(turn.tools) if tool["function"].get("strict")), None)
    if params.structure is not None:
        return _own_structure(turn, bool(callable_tools), opened)
    alternatives = []
    if callable_tools and (_forced(turn) or turn.structure is not None):
        if not _forced(turn) and form != "hermes":
            message = (
                "with tools that may be called is not supported for this model; set tool_choice to none or required"
            )
            raise turn.refused("structure", message)
        named = turn.tool_choice.name if isinstance(turn.tool_choice, Named) else None
        tools = [tool for tool in callable_tools if named is None or tool["function"]["name"] == named]
        most = MOST_CALLS if turn.parallel_tool_calls and named is None else 1
        alternatives.append(forced_calls(form, tools, most))
    elif callable_tools and strict is not None:
        if form != "hermes":
            message = "is supported for this model only if tool_choice is required or names the function; leave it out"
            field_name = turn.names.get("tools", "tools")
            raise ApiError(
                400, f"{field_name}.{strict}: strict {message}", param=f"{field_name}.{strict}", code="invalid_value"
            )
        return dataclasses.replace(params, grammar=strict_calls(callable_tools))
    if turn.structure is not None and not _forced(turn):
        schema = turn.structure.schema if isinstance(turn.structure, JsonSchema) else {"type": "object"}
        may_think = _may_think(turn, info)
        if not (alternatives or opened or may_think):
            return dataclasses.replace(params, json_schema=schema)
        alternatives.append(json_rule(schema))
    if not alternatives:
        return params
    return dataclasses.replace(
        params, grammar=answer_grammar(*alternatives, thought=opened, may_think=_may_think(turn, info))
    )


def _own_structure(turn: Turn, callable_tools: bool, opened: bool) -> SamplingParams:
    """Where a request brings its own regular expression or grammar."""
    option = turn.params.structure or ""
    if turn.structure is not None:
        raise turn.refused(option, "an answer has one structure; leave out this or the other")
    if callable_tools and (_forced(turn) or option in ("json_schema", "choice")):
        raise turn.refused(option, "an answer that has it can call no tools; set tool_choice to none")
    if opened:
        raise turn.refused(
            option, "this model thinks first, which has no such structure; give a JSON schema as response format"
        )
    return turn.params


def _may_think(turn: Turn, info: ModelInfo) -> bool:
    """Whether the model opens thoughts by itself, which structure then leaves room for: where its template can switch
    them, and they are not off."""
    return bool(info.template_options) and not any(
        turn.template_options.get(option) in (False, "none") for option in info.template_options
    )
