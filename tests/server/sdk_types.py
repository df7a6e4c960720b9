"""The types of the official clients, taken at their word: no field may be missing, wrong or unknown."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter


def validated(kind: Any, data: Any) -> Any:
    """``data`` as a client's type ``kind``.

    Raises:
        ValueError: the type does not admit it, or has no field for a part of it.
    """
    value = _adapter(kind).validate_python(data)
    _refuse_extra(value, "")
    return value


def validated_event(union: Any, data: dict[str, Any]) -> Any:
    """An event as the member of a client's union of events that its ``type`` tells."""
    members = get_args(get_args(union)[0])
    kind = next((one for one in members if get_args(one.model_fields["type"].annotation) == (data["type"],)), None)
    if kind is None:
        raise ValueError(f"the client knows no event {data['type']!r}")
    return validated(kind, data)


def sse_events(lines: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """(event, data) of a stream's lines."""
    found, name = [], None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            assert name == data["type"]
            found.append((name, data))
        else:
            assert line == "" or line.startswith(":")
    return found


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _refuse_extra(value: Any, where: str) -> None:
    if isinstance(value, BaseModel):
        if value.model_extra:
            raise ValueError(f"{where or 'the reply'}: {type(value).__name__} has no {sorted(value.model_extra)}")
        for name in type(value).model_fields:
            _refuse_extra(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            _refuse_extra(one, f"{where}.{i}")
