"""Bodies of requests of OpenAI's Responses API.

A field that is not declared here is refused by name. These are taken although they change nothing: ``user``,
``safety_identifier`` and ``prompt_cache_key`` (known prefixes are always reused), ``service_tier`` "auto" or "default",
``truncation`` "disabled", ``text.verbosity`` "medium", ``reasoning.summary`` "auto" (reasoning is never summarised but
told in full).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from danlu.server.api.tagged import by_type
from danlu.server.schema import Body, JsonObject, Metadata, Text

MOST_ITEMS, MOST_TOOLS, MOST_TOP_LOGPROBS = 10_000, 128, 20

Id = Annotated[str, Field(min_length=1, max_length=128)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
Status = Literal["in_progress", "completed", "incomplete"]
Include = Literal["message.output_text.logprobs"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

# ------------------------------------------------------------------------------------------------ items of the input


class TopLogprob(Body):
    """A token that could have stood there."""

    token: Text
    bytes: list[Annotated[int, Field(ge=0, le=255)]]
    logprob: float


class Logprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class InputText(Body):
    """Text that a user, a developer or a function gives."""

    type: Literal["input_text"]
    text: Text


class OutputText(Body):
    """Text that the model wrote."""

    type: Literal["output_text"]
    text: Text
    annotations: list[JsonObject] = Field([], description="Handed back, not read.")
    logprobs: list[Logprob] | None = Field(None, description="Handed back, not read.")
    parsed: Any = Field(None, exclude=True, description="What OpenAI's client made of the text; not read.")


class Refusal(Body):
    """Words in which a model refused."""

    type: Literal["refusal"]
    refusal: Text


_parts = {"input_text": InputText, "output_text": OutputText, "refusal": Refusal}
Part = Annotated[
    Annotated[InputText, Tag("InputText")]
    | Annotated[OutputText, Tag("OutputText")]
    | Annotated[Refusal, Tag("Refusal")],
    *by_type(_parts, "content"),
]
Content = Annotated[
    Annotated[Text, Tag("str")] | Annotated[list[Part], Field(max_length=MOST_ITEMS), Tag("list[Part]")],
    Discriminator(lambda value: "list[Part]" if isinstance(value, list) else "str"),
]
OutputContent = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[
        list[Annotated[Annotated[InputText, Tag("InputText")], *by_type({"input_text": InputText}, "output")]],
        Field(max_length=MOST_ITEMS),
        Tag("list[Part]"),
    ],
    Discriminator(lambda value: "list[Part]" if isinstance(value, list) else "str"),
]


class InputMessage(Body):
    """A message of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="Handed back, not read.")

    @model_validator(mode="after")
    def _who_says_what(self) -> InputMessage:
        for part in self.content if isinstance(self.content, list) else []:
            if isinstance(part, InputText) == (self.role == "assistant"):
                kinds = "output_text or refusal" if self.role == "assistant" else "input_text"
                raise ValueError(f"content: that of the role {self.role!r} is {kinds}, not {part.type}")
        return self


class FunctionCall(Body):
    """The model called a function."""

    type: Literal["function_call"]
    call_id: Id
    name: Name
    arguments: Text
    id: Id | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None


class FunctionCallOutput(Body):
    """What the function gave."""

    type: Literal["function_call_output"]
    call_id: Id
    output: OutputContent
    id: Id | None = None
    status: Status | None = None
    name: Name | None = Field(None, description="Of the function; not read, since its call tells it.")
    namespace: None = None
    caller: None = None


class SummaryText(Body):
    """A summary of reasoning."""

    type: Literal["summary_text"]
    text: Text


class ReasoningText(Body):
    """Reasoning, as the model wrote it."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Body):
    """What the model thought before it answered."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: list[SummaryText] = Field([], max_length=MOST_ITEMS)
    content: list[ReasoningText] | None = Field(None, max_length=MOST_ITEMS)
    encrypted_content: None = None
    status: Status | None = None


_items = {
    "message": InputMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": ReasoningItem,
}
Item = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[FunctionCall, Tag("FunctionCall")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")],
    *by_type(_items, "item", default="message"),
]
Input = Annotated[
    Annotated[Text, Field(min_length=1), Tag("str")]
    | Annotated[list[Item], Field(min_length=1, max_length=MOST_ITEMS), Tag("list[Item]")],
    Discriminator(lambda value: "list[Item]" if isinstance(value, list) else "str"),
]

# ------------------------------------------------------------------------------------------------ tools, formats


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Arguments always follow the schema. Default: false.")


Tool = Annotated[Annotated[FunctionTool, Tag("FunctionTool")], *by_type({"function": FunctionTool}, "tool")]


class FunctionChoice(Body):
    """This function is to be called."""

    type: Literal["function"]
    name: Name


class AllowedTools(Body):
    """Only these of the tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MOST_TOOLS)


_choose = by_type({"function": FunctionChoice, "allowed_tools": AllowedTools}, "tool_choice")
ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("str")]
    | Annotated[
        Annotated[FunctionChoice, Tag("FunctionChoice")] | Annotated[AllowedTools, Tag("AllowedTools")],
        *_choose,
        Tag("dict[ToolChoice]"),
    ],
    Discriminator(lambda value: "str" if isinstance(value, str) else "dict[ToolChoice]"),
]


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Some JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: Name
    schema_: JsonObject = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = Field(None, description="The schema is followed either way.")


_formats = {"text": TextFormat, "json_object": JsonObjectFormat, "json_schema": JsonSchemaFormat}
Format = Annotated[
    Annotated[TextFormat, Tag("TextFormat")]
    | Annotated[JsonObjectFormat, Tag("JsonObjectFormat")]
    | Annotated[JsonSchemaFormat, Tag("JsonSchemaFormat")],
    *by_type(_formats, "format"),
]


class TextOptions(Body):
    """How the answer's text is built."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Body):
    """How much the model thinks."""

    effort: Effort | None = Field(None, description="Where the model's chat template knows it.")
    summary: Literal["auto"] | None = Field(None, description="Reasoning is not summarised but told in full.")


class StreamOptions(Body):
    """How events are sent."""

    include_obfuscation: Literal[False] | None = Field(None, description="Events are never padded.")


# ------------------------------------------------------------------------------------------------ requests


class Asked(Body):
    """What both an answer and a count of its input's tokens are asked with."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="Default: the first.")
    input: Input
    instructions: Text | None = Field(None, description="A system message. Not carried over to the next response.")
    previous_response_id: Id | None = Field(None, description="The response that this one goes on from.")
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description='Default: "auto".')
    parallel_tool_calls: bool | None = Field(None, description="Default: true.")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None


class CreateResponse(Asked):
    """What a response is asked for with."""

    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 24)] | None = Field(None, description="Thoughts included.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the most likely token. Default: 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Keep the likeliest tokens that make up this share.")
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = Field(
        None, description="Log probabilities of the answer's tokens and of so many others in their places."
    )
    include: list[Include] | None = Field(None, max_length=10)
    store: bool | None = Field(None, description="Keep the response, for 30 days. Default: true.")
    background: bool | None = Field(None, description="Answer at once and write on, whoever listens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    service_tier: Literal["auto", "default"] | None = None
