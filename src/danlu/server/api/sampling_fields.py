"""The fields of a request that say how the next token is chosen, alike for completions and chat.

Those of OpenAI's API, and beyond them the engine's own under the names that vLLM gave them.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from danlu.config import validate
from danlu.engine.config import LONGEST_STRING, MOST_BEAMS, MOST_SEQUENCES, MOST_STRINGS, SamplingParams
from danlu.errors import DanluError
from danlu.server.errors import ApiError, from_user_error
from danlu.server.schema import Body, JsonObject, Text

MOST_TOKENS: Final = 1 << 24
"""No model's context is longer; bounds the fields that count tokens."""

MOST_BIASES: Final = 10_000

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STRING)]
StopTexts = Annotated[
    Annotated[StopText, Tag("str")] | Annotated[list[StopText], Field(max_length=MOST_STRINGS), Tag("list[str]")],
    Discriminator(lambda value: "list[str]" if isinstance(value, list) else "str"),
]

NAMES: Final[dict[str, str]] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_ids": "stop_token_ids",
    "allowed_tokens": "allowed_token_ids",
    "banned_strings": "bad_words",
    "beams": "use_beam_search",
    "json_schema": "structured_outputs.json",
    "regex": "structured_outputs.regex",
    "choice": "structured_outputs.choice",
    "grammar": "structured_outputs.grammar",
}
"""Options of the engine -> fields of a request, where they are not called alike."""


class StructuredOutputs(Body):
    """The structure that an answer has; one of them."""

    json_schema: JsonObject | Text | None = Field(
        None, alias="json", description="The answer is JSON that this JSON schema admits."
    )
    regex: str | None = Field(
        None, min_length=1, max_length=100_000, description="The whole answer matches this regular expression."
    )
    choice: list[Annotated[str, Field(min_length=1, max_length=100_000)]] | None = Field(
        None, min_length=1, max_length=5000, description="The answer is one of these texts."
    )
    grammar: str | None = Field(
        None, min_length=1, max_length=100_000, description="The answer follows this grammar, in Lark's syntax."
    )


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = Field(None, description="A last chunk, without choices, tells the usage.")
    include_obfuscation: Literal[False] | None = Field(None, description="Chunks are never padded: only false is true.")


def _require_few(value: Any) -> Any:
    """Before each of them is looked at."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"has {len(value)} tokens; at most {MOST_BIASES} can be biased")
    return value


class SamplingFields(Body):
    """How answers are sampled."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the most likely token. Default: 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Keep the likeliest tokens that make up this share.")
    n: int | None = Field(None, ge=1, le=MOST_SEQUENCES, description="Answers to give to a prompt. Default: 1.")
    stop: StopTexts | None = Field(None, description="Texts that end the answer; they are not part of it.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=MOST_BIASES),
        BeforeValidator(_require_few),
    ] = Field(None, description="Added to the logits of tokens, by their ids; -100 all but bars a token.")

    top_k: int | None = Field(
        None, ge=-1, lt=1 << 31, description="Keep the k most likely tokens; 0 and -1 keep all. Not in OpenAI's API."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest. Not in OpenAI's API."
    )
    typical_p: float | None = Field(None, gt=0, le=1, description="Locally typical sampling. Not in OpenAI's API.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Weakens tokens of prompt and answer; 1 is off. Not in OpenAI's API."
    )
    count_penalty: float | None = Field(
        None, ge=0, le=1000, description="Divides a probability by 1 + penalty x uses. Not in OpenAI's API."
    )
    min_tokens: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="The answer has so many tokens at least. Not in OpenAI's API."
    )
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=1000, description="Ids that end the answer. Not in OpenAI's API."
    )
    ignore_eos: bool | None = Field(
        None, description="The model's own stop tokens do not end the answer. Not in OpenAI's API."
    )
    allowed_token_ids: list[TokenId] | None = Field(
        None,
        min_length=1,
        max_length=100_000,
        fail_fast=True,
        description="Only these and stop tokens are used. Not in OpenAI's API.",
    )
    bad_words: list[StopText] | None = Field(
        None, max_length=MOST_STRINGS, description="Texts that never occur in the answer. Not in OpenAI's API."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The structure that the answer has. Not in OpenAI's API."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MOST_SEQUENCES,
        description="Make so many answers and give the n of highest mean log probability; beams of a beam search.",
    )
    use_beam_search: bool | None = Field(
        None, description="Beam search with best_of (or n) beams instead of sampling. Not in OpenAI's API."
    )
    length_penalty: float | None = Field(
        None, ge=-10, le=10, description="Of beam search: above 0 favours long answers. Not in OpenAI's API."
    )
    early_stopping: bool | None = Field(
        None, description="Beam search ends with as many finished answers as beams. Not in OpenAI's API."
    )

    def params(self, **more: Any) -> SamplingParams:
        """What the engine is asked for.

        Args:
            more: further options of :class:`SamplingParams`, such as max_new_tokens; None leaves one out.

        Raises:
            ApiError: they contradict each other.
        """
        given = self._alike() | self._converted() | self._structure() | self._beams()
        for name, value in more.items():
            if value is not None and name in given:
                theirs = NAMES.get(name, name)
                raise ApiError(
                    400, f"{theirs}: is given in two ways; leave out one", param=theirs, code="invalid_value"
                )
            if value is not None:
                given[name] = value
        try:
            return validate(SamplingParams(**given))
        except DanluError as error:
            raise from_user_error(error, NAMES) from None

    def _alike(self) -> dict[str, Any]:
        """Options that need no more than their name."""
        values = {option: getattr(self, field) for option, field in _SAME.items()}
        return {option: tuple(v) if isinstance(v, list) else v for option, v in values.items() if v is not None}

    def _converted(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.stop is not None:
            found["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.top_p is not None:
            found["top_p"] = max(self.top_p, sys.float_info.min)  # the likeliest token is kept even at 0
        if self.top_k is not None:
            found["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            found["seed"] = self.seed % 2**63
        if self.logit_bias:
            found["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        return found

    def _structure(self) -> dict[str, Any]:
        wanted = self.structured_outputs
        if wanted is None:
            return {}
        found = {name: getattr(wanted, name) for name in ("json_schema", "regex", "choice", "grammar")}
        found = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}
        if not found:
            message = "structured_outputs: names no structure; give json, regex, choice or grammar"
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        return found

    def _beams(self) -> dict[str, Any]:
        """best_of, or what it means for a beam search."""
        if self.use_beam_search:
            beams = self.best_of or self.n or 1
            if not 2 <= beams <= MOST_BEAMS:
                message = f"use_beam_search: give the number of beams, 2 to {MOST_BEAMS}, as best_of or as n"
                raise ApiError(400, message, param="use_beam_search", code="invalid_value")
            return {"beams": beams} if self.temperature is not None else {"beams": beams, "temperature": 0.0}
        for name in ("length_penalty", "early_stopping"):
            if getattr(self, name):
                message = f"{name}: belongs to beam search; set use_beam_search, or leave it out"
                raise ApiError(400, message, param=name, code="invalid_value")
        return {} if self.best_of is None else {"best_of": self.best_of}


_SAME: Final[dict[str, str]] = {
    "temperature": "temperature",
    "n": "n",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "count_penalty": "count_penalty",
    "min_new_tokens": "min_tokens",
    "stop_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "allowed_tokens": "allowed_token_ids",
    "banned_strings": "bad_words",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}
"""Options of the engine -> the field that holds the same value."""
