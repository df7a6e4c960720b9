"""Parts of a request that tell by one of their fields, mostly ``type``, what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, Discriminator

from danlu.server.schema import Body


def by_type(
    kinds: Mapping[str, type[Body]], what: str, default: str | None = None, key: str = "type"
) -> tuple[Discriminator, BeforeValidator]:
    """How to choose among models that are tagged by the names of their classes (see :func:`tag`).

    Args:
        kinds: the value of ``type`` -> the model.
        what: how a message calls such a part.
        default: the type of those that do not tell it.
        key: the field.
    """

    def kind_of(value: Any) -> Any:
        return value.get(key, default) if isinstance(value, dict) else getattr(value, key, default)

    def check(value: Any) -> Any:
        if not isinstance(value, dict | BaseModel):
            raise ValueError(f"is no {what}, which is an object")
        kind = kind_of(value)
        if not isinstance(kind, str):
            raise ValueError(f"this {what} has no {key}; give one of {', '.join(kinds)}")
        if kind not in kinds:
            raise ValueError(
                f"{what} of {key} {kind[:100]!r}: is not supported by this server; it takes {', '.join(kinds)}"
            )
        return value

    def choose(value: Any) -> str:
        return kinds[kind_of(value)].__name__

    return Discriminator(choose), BeforeValidator(check)
