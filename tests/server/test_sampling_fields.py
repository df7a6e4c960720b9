"""Fields of requests as the engine's options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from danlu.engine.config import SamplingParams
from danlu.server.api.sampling_fields import SamplingFields
from danlu.server.errors import ApiError

GIVEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.9, {"top_p": 0.9}),
    "n": (3, {"n": 3}),
    "stop": ("end", {"stop": ("end",)}),
    "seed": (7, {"seed": 7}),
    "presence_penalty": (-1.5, {"presence_penalty": -1.5}),
    "frequency_penalty": (1.5, {"frequency_penalty": 1.5}),
    "logit_bias": ({"3": -100, "4": 1.5}, {"logit_bias": {3: -100.0, 4: 1.5}}),
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.1, {"min_p": 0.1}),
    "typical_p": (0.8, {"typical_p": 0.8}),
    "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
    "count_penalty": (0.3, {"count_penalty": 0.3}),
    "min_tokens": (2, {"min_new_tokens": 2}),
    "stop_token_ids": ([1, 2], {"stop_ids": (1, 2)}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "allowed_token_ids": ([1, 2], {"allowed_tokens": (1, 2)}),
    "bad_words": (["x", "y"], {"banned_strings": ("x", "y")}),
    "structured_outputs": ({"choice": ["a", "b"]}, {"choice": ("a", "b")}),
    "best_of": (4, {"best_of": 4}),
    "use_beam_search": (False, {}),
    "length_penalty": (0.0, {"length_penalty": 0.0}),
    "early_stopping": (False, {}),
}
"""A value of each field, and what it means."""


def params(**fields: Any) -> SamplingParams:
    return SamplingFields.model_validate(fields).params(max_new_tokens=10)


def test_no_field_changes_nothing() -> None:
    assert params() == SamplingParams(max_new_tokens=10)
    nulls = dict.fromkeys(SamplingFields.model_fields)
    assert params(**nulls) == params()


@pytest.mark.parametrize("name", SamplingFields.model_fields)
def test_every_field_reaches_the_engine(name: str) -> None:
    value, options = GIVEN[name]
    assert params(**{name: value}) == dataclasses.replace(SamplingParams(max_new_tokens=10), **options)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": []}, {}),
        ({"top_k": -1}, {}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"structured_outputs": {"json": {"type": "object"}}}, {"json_schema": {"type": "object"}}),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, {"json_schema": '{"type": "object"}'}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"use_beam_search": True, "n": 2}, {"beams": 2, "n": 2, "temperature": 0.0}),
        (
            {"use_beam_search": True, "best_of": 4, "n": 2, "length_penalty": 2, "early_stopping": True},
            {"beams": 4, "n": 2, "temperature": 0.0, "length_penalty": 2.0, "early_stopping": True},
        ),
    ],
)
def test_what_fields_mean(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert params(**fields) == dataclasses.replace(SamplingParams(max_new_tokens=10), **options)


def test_a_share_of_nothing_leaves_the_likeliest_token() -> None:
    assert 0 < params(top_p=0).top_p < 1e-300


def test_a_structure_that_is_given_twice_is_refused() -> None:
    fields = SamplingFields.model_validate({"structured_outputs": {"json": {}}})
    with pytest.raises(ApiError, match=r"^structured_outputs\.json: is given in two ways"):
        fields.params(json_schema={})
    with pytest.raises(ApiError, match=r"structured_outputs\.json and structured_outputs\.regex are given together"):
        fields.params(regex="a")
