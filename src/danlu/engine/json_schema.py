"""JSON schemas that come from outside: read, bounded, and refused where no finite answer can follow them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from danlu.errors import DanluError

MAX_CHARS = 200_000
MAX_NODES = 20_000
"""Objects and lists."""
MAX_REFS = 1_000

_ROUNDS = 20  # in which the search for endless schemas has to come to its end; else it gives the benefit of the doubt


def read_schema(source: str | dict[str, Any]) -> dict[str, Any]:
    """A schema as a mapping of JSON values.

    Args:
        source: the mapping, or its JSON text.

    Raises:
        DanluError: it is not a JSON object, too large or too deep, or every answer it admits is endless.
    """
    try:
        text = source if isinstance(source, str) else json.dumps(source, allow_nan=False)
        if len(text) > MAX_CHARS:
            raise DanluError(f"json_schema: has {len(text)} characters; at most {MAX_CHARS} can be followed")
        schema = json.loads(text, parse_constant=_refuse)
        if not isinstance(schema, dict):
            raise DanluError(f"json_schema: is {schema!r:.50}; expected a JSON object that tells what is admitted")
        nodes = list(_nodes(schema))
        if len(nodes) > MAX_NODES or sum("$ref" in node for node in nodes) > MAX_REFS:
            raise DanluError(
                f"json_schema: is too large; it may have {MAX_NODES} objects and lists, and {MAX_REFS} $ref"
            )
        if not _has_end(schema):
            raise DanluError("json_schema: admits only endless answers: what it requires refers back to itself")
    except RecursionError:
        raise DanluError("json_schema: is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise DanluError(f"json_schema: is not JSON ({error})") from None
    return schema


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any] | list[Any]]:
    """All objects and lists, the schema itself first."""
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (dict, list)):
            yield node
            waiting += node.values() if isinstance(node, dict) else node


def _has_end(schema: dict[str, Any]) -> bool:
    """Whether some answer is finite, as far as $ref, required properties and items tell.

    It is the least fixed point: a $ref has an end if its target has one, where those whose targets are being looked at
    are taken to have none until a former round has found one.
    """
    ending: set[str] = set()
    for _ in range(_ROUNDS):
        verdicts = dict.fromkeys(ending, True)
        if _ends(schema, schema, verdicts):
            return True
        found = {ref for ref, verdict in verdicts.items() if verdict}
        if found == ending:
            return False
        ending = found
    return True


def _ends(node: Any, schema: dict[str, Any], verdicts: dict[str, bool]) -> bool:
    """Whether a part of the schema has a finite answer.

    Args:
        verdicts: what is known of each $ref; it is added to.
    """
    if not isinstance(node, dict):
        return True
    needed: list[bool] = []
    if isinstance(ref := node.get("$ref"), str):
        if ref not in verdicts:
            verdicts[ref] = False
            verdicts[ref] = _ends(_target(schema, ref), schema, verdicts)
        needed.append(verdicts[ref])
    for name in ("anyOf", "oneOf"):
        if isinstance(options := node.get(name), list):
            needed.append(any(_ends(option, schema, verdicts) for option in options))
    if isinstance(parts := node.get("allOf"), list):
        needed += [_ends(part, schema, verdicts) for part in parts]
    if node.get("type") == "object" and isinstance(required := node.get("required"), list):
        properties = node.get("properties")
        if isinstance(properties, dict):
            needed += [_ends(properties.get(key), schema, verdicts) for key in required if isinstance(key, str)]
    if node.get("type") == "array" and node.get("minItems") and "prefixItems" not in node:
        needed.append(_ends(node.get("items"), schema, verdicts))
    return all(needed)


def _target(schema: dict[str, Any], ref: str) -> Any:
    """What a $ref within the schema points to (RFC 6901); None where that is nothing."""
    if not ref.startswith("#"):
        return None
    node: Any = schema
    for part in ref[1:].split("/")[1:]:
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    return node
