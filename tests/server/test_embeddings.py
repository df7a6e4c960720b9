"""/v1/embeddings through the official client, against the embedder and the engine themselves."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.models.embedder import Embedder
from danlu.tokenizer.tokenizer import Tokenizer

TEXTS = ["a cat sits on the mat", "丹炉", "", "naïve café 😀"]


@pytest.fixture(scope="module")
def client(text_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{text_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def embedder(minilm: Path) -> Embedder:
    return Embedder.load(minilm)


def vectors_of(answer: openai.types.CreateEmbeddingResponse) -> Any:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data])


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json=body, timeout=60, trust_env=False)


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
def test_vectors_are_the_embedders(client: openai.OpenAI, embedder: Embedder, encoding_format: Any) -> None:
    given = {} if encoding_format is None else {"encoding_format": encoding_format}
    answer = client.embeddings.create(model="minilm", input=TEXTS, **given)
    expected = embedder.encode(TEXTS)
    if encoding_format == "base64":  # the client unpacks it only where it asked for it by itself
        found = np.stack([np.frombuffer(base64.b64decode(str(one.embedding)), "<f4") for one in answer.data])
    else:
        found = vectors_of(answer)
    assert np.abs(found - expected).max() < 1e-6
    assert answer.model == "minilm"
    n_tokens = sum(len(embedder.tokenize(text)[0]) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (n_tokens, n_tokens)


def test_a_text_may_come_alone_or_as_token_ids(client: openai.OpenAI, embedder: Embedder) -> None:
    expected = embedder.encode(TEXTS[:2])
    ids = [embedder.tokenize(text)[0] for text in TEXTS[:2]]
    for given, wanted in ((TEXTS[0], expected[:1]), (ids[0], expected[:1]), (ids, expected)):
        found = vectors_of(client.embeddings.create(model="minilm", input=given))  # type: ignore[arg-type]
        assert np.abs(found - wanted).max() < 1e-6


def test_fewer_dimensions_have_length_one_again(client: openai.OpenAI, embedder: Embedder) -> None:
    found = vectors_of(client.embeddings.create(model="minilm", input=TEXTS, dimensions=5))
    expected = embedder.encode(TEXTS)[:, :5]
    assert np.abs(found - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() < 1e-6


def test_a_language_model_gives_the_mean_of_its_hidden_states(client: openai.OpenAI, model_folder: Path) -> None:
    texts = [text for text in TEXTS if text]  # of an empty one it reads a single token, whose vector is 0
    found = vectors_of(client.embeddings.create(model="tiny", input=texts))
    with Engine(model_folder, EngineConfig(kv_memory=64)) as engine:
        expected = engine.embed(texts).numpy()
    assert np.abs(found - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() < 1e-5
    cut = client.embeddings.create(model="tiny", input=TEXTS[:1], extra_body={"truncate_prompt_tokens": 4})
    assert cut.usage.prompt_tokens == 4


def test_many_texts_at_once(client: openai.OpenAI, embedder: Embedder) -> None:
    texts = [f"{i} " * (i % 7) for i in range(100)]
    found = vectors_of(client.embeddings.create(model="minilm", input=texts, encoding_format="float"))
    assert np.abs(found - embedder.encode(texts)).max() < 1e-6


def test_long_texts_are_cut_only_where_that_is_asked_for(text_url: str, embedder: Embedder) -> None:
    long = "word " * 300
    error = post(text_url, model="minilm", input=["x", long]).json()["error"]
    assert error["param"] == "input.1"
    assert error["message"].startswith("input.1: has 302 tokens and the model reads 256")
    assert post(text_url, model="minilm", input=long).json()["error"]["param"] == "input"
    cut = post(text_url, model="minilm", input=long, truncate_prompt_tokens=-1).json()
    assert np.abs(np.array(cut["data"][0]["embedding"]) - embedder.encode([long])[0]).max() < 1e-6
    assert cut["usage"]["prompt_tokens"] == 256


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input.0"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "dimensions": 385}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"input": [[1], [40_000]]}, "input.1"),
        ({"input": [1, -1]}, "input.1"),
        ({"input": "x", "task": "retrieval"}, "task"),
        ({"input": "x", "model": "org/ranker"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(text_url: str, body: dict[str, Any], param: str) -> None:
    answer = post(text_url, **({"model": "minilm"} | body))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_embedder_writes_no_text(text_url: str, model_folder: Path) -> None:
    answer = httpx.post(f"{text_url}/v1/completions", json={"model": "minilm", "prompt": "x"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_model")
    ids = Tokenizer.load(model_folder).encode("too long " * 5000)
    error = post(text_url, model="tiny", input=ids).json()["error"]
    assert error["param"] == "input"
