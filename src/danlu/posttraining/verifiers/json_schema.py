"""Whether an answer is JSON that a schema admits.

A schema can take for ever on an answer that is made for it, so that this runs in a worker (``entry_point.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match  # type: ignore[import-untyped]
from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
from referencing import Registry
from referencing.exceptions import Unresolvable

from danlu.posttraining.verifiers.base import fenced_blocks, without_thoughts
from danlu.posttraining.verifiers.text import MAX_ANSWER, Scored


def json_schema(prompt: object, answer: str, row: Mapping[str, Any]) -> Scored:
    """1 where the answer is JSON, fenced or not, that the row's ``schema`` admits, else 0.

    The schema is an object or its text, of any draft; references lead nowhere but into the schema itself.
    """
    schema = row.get("schema")
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(schema, (dict, bool)):
            return None, "the row's field 'schema' is no JSON schema"
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, SchemaError, RecursionError) as error:
        return None, f"the row's field 'schema' is no JSON schema ({str(error).splitlines()[0][:200]})"
    text = without_thoughts(answer)
    text = (fenced_blocks(text) or [text])[-1]
    if len(text) > MAX_ANSWER:
        return 0.0, f"has more than {MAX_ANSWER} characters"
    try:
        instance = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return 0.0, f"is not JSON ({str(error)[:200]})"
    try:
        problem = best_match(kind(schema, registry=Registry()).iter_errors(instance))
    except (Unresolvable, re.error) as error:
        return None, f"the row's field 'schema' cannot be followed ({str(error)[:200]})"
    except RecursionError:
        return None, "the row's field 'schema' is too deep, or leads round in a circle"
    if problem is None:
        return 1.0, ""
    return 0.0, f"{problem.json_path}: {problem.message[:200]}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
