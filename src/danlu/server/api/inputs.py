"""Texts as OpenAI's API takes them: one or many, as text or as token ids."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, Discriminator, Field, Tag

from danlu.server.api.sampling_fields import TokenId
from danlu.server.schema import Text

MOST_INPUTS: Final = 2048

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]


def _shape(value: Any) -> str:
    """Which of the shapes a value is meant to have, so that what is wrong with it is told of that one alone."""
    if not isinstance(value, list):
        return "str"
    first = value[0] if value else ""
    return "list[list[int]]" if isinstance(first, list) else "list[str]" if isinstance(first, str) else "list[int]"


Inputs = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True), Tag("list[str]")]
    | Annotated[TokenIds, Tag("list[int]")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True), Tag("list[list[int]]")],
    Discriminator(_shape),
]
"""Text, texts, token ids, or lists of token ids."""


def _not_zero(n: int) -> int:
    if n == 0:
        raise ValueError("0 tokens say nothing; leave it out, or give -1 for as many as the model reads")
    return n


ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Truncate = Annotated[int, Field(ge=-1, le=1 << 20, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)]
"""Tokens of a text that are read at most, special tokens included; -1: as many as the model can."""


def as_list(value: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Each text or list of ids by itself."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return list(value)


def is_single(value: str | list[str] | list[int] | list[list[int]]) -> bool:
    """Whether it was not given as a list of texts."""
    return isinstance(value, str) or isinstance(value[0], int)
