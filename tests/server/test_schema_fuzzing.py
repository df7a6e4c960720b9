"""Requests made from the OpenAPI document, as it wants them and not: no error of the server's own, and no answer whose
status, type, body or headers the document does not tell.

DANLU_FUZZ=500 makes so many requests to each route; a dozen otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_process import serving

EXAMPLES = int(os.environ.get("DANLU_FUZZ", "12"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
BOUNDS = ("maxLength", "maxItems", "maxProperties")
LARGEST = 200
"""Bounds above it are not shown to schemathesis, which would make megabytes to try them."""


def without_large_bounds(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: without_large_bounds(value)
            for key, value in node.items()
            if not (key in BOUNDS and isinstance(value, int) and value > LARGEST)
        }
    return [without_large_bounds(value) for value in node] if isinstance(node, list) else node


@pytest.fixture(scope="module")
def base_url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small context, so that an answer without a limit is short, too."""
    data = tmp_path_factory.mktemp("fuzzed")
    with serving(f"--model=tiny={model_folder}", "--context=96", "--deadline=20", data=data) as server:
        yield server.url


@pytest.fixture(scope="module")
def document(base_url: str) -> BaseSchema:
    config = SchemathesisConfig()
    config.projects.default.phases.coverage.enabled = False
    told = httpx.get(f"{base_url}/openapi.json", trust_env=False, timeout=60).json()
    schema = schemathesis.openapi.from_dict(without_large_bounds(told), config=config)
    schema.config.update(base_url=base_url)
    return schema


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as documented", "otherwise"])
def test_the_server_does_what_its_document_tells(document: BaseSchema, mode: GenerationMode) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 12, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def conforms(operation: APIOperation[Any], data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.validate_response(case.call(timeout=60), checks=CHECKS)

    failures = {}
    for operation in (result.ok() for result in document.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters or operation.query):
            continue  # there is nothing that could be wrong
        try:
            conforms(operation)
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # any text is a name of a model, say
        except (FailureGroup, Failure) as failure:
            failures[operation.label] = str(failure)
    assert not failures, "\n\n".join(f"{label}: {told}" for label, told in failures.items())


def test_the_document_tells_of_no_status_that_is_never_answered(base_url: str) -> None:
    """FastAPI documents a 422 for whatever it validates; here that is a 400."""
    paths = httpx.get(f"{base_url}/openapi.json", trust_env=False, timeout=60).json()["paths"]
    operations = [operation for path in paths.values() for operation in path.values()]
    assert len(operations) > 30
    assert not [operation for operation in operations if "422" in operation["responses"]]
