"""What all bodies of requests have in common."""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST_FIELDS, MOST_MISTAKES = 1000, 100
"""Of one object: more mistakes are not told apart, since a body has room for so many that telling them takes a minute.
"""


class Body(BaseModel):
    """A request's body: a field that is not declared is refused, and nothing is taken for what it is not (true is no 1,
    "1" is no number, NaN is none)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _bound_mistakes(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise ValueError(f"has {len(value)} fields; most of them are unknown, see /openapi.json")
        try:
            return handler(value)
        except ValidationError as error:
            if (count := error.error_count()) <= MOST_MISTAKES:
                raise
        raise PydanticCustomError(
            "too_many_mistakes", "has {count} fields that are unknown or wrong; see /openapi.json", {"count": count}
        )


class Reply(BaseModel):
    """A response's body."""

    model_config = ConfigDict(extra="forbid")


Text = Annotated[str, Field(max_length=4 << 20)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""Up to 16 pairs that are handed back."""

DEEPEST = 100
"""Nesting of objects that are taken as they are; templates and grammars descend into them."""


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for members in inside for one in members]
        if not level:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # neither has JSON: NaN, half a character
            return value
    raise ValueError(f"is nested more than {DEEPEST} levels deep")


JsonObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]
"""Any JSON object that can be written down again."""
