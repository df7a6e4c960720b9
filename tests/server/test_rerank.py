"""/v1/score and /v1/rerank over HTTP, against sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from sentence_transformers import CrossEncoder

from danlu.models.embedder import Embedder

QUERY = "hello"
DOCUMENTS = ["hello world", "你好", "a b c", "", "hello"]
http = httpx.Client(trust_env=False, timeout=60)  # one: each would read the system's certificates


@pytest.fixture(scope="module")
def expected(ranker_folder: Path) -> list[float]:
    """Scores of the documents."""
    pairs = [(QUERY, text) for text in DOCUMENTS]
    return [float(score) for score in CrossEncoder(str(ranker_folder), device="cpu").predict(pairs)]


def post(url: str, path: str, **body: Any) -> Any:
    return http.post(f"{url}{path}", json=body)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_documents_come_in_the_order_of_their_scores(text_url: str, path: str, expected: list[float]) -> None:
    documents = [DOCUMENTS[0], *({"text": text} for text in DOCUMENTS[1:])]
    answer = post(text_url, path, model="org/ranker", query=QUERY, documents=documents).json()
    order = sorted(range(len(expected)), key=lambda i: -expected[i])
    assert [one["index"] for one in answer["results"]] == order
    found = [one["relevance_score"] for one in answer["results"]]
    assert found == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert all(one.keys() == {"index", "relevance_score"} for one in answer["results"])
    assert answer["model"] == "org/ranker"
    assert answer["usage"]["total_tokens"] > len(documents) * 8


def test_only_the_best_with_their_texts(text_url: str, expected: list[float]) -> None:
    body = {"model": "org/ranker", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "return_documents": True}
    found = post(text_url, "/v1/rerank", **body).json()["results"]
    order = sorted(range(len(expected)), key=lambda i: -expected[i])[:2]
    assert [one["document"] for one in found] == [{"text": DOCUMENTS[i]} for i in order]


def test_scores_of_pairs_in_their_order(text_url: str, expected: list[float]) -> None:
    one_to_many = post(text_url, "/v1/score", model="org/ranker", text_1=QUERY, text_2=DOCUMENTS).json()
    assert one_to_many["object"] == "list"
    assert [one["score"] for one in one_to_many["data"]] == pytest.approx(expected, abs=1e-5)
    assert [one["index"] for one in one_to_many["data"]] == list(range(len(DOCUMENTS)))
    each = post(text_url, "/v1/score", model="org/ranker", text_1=[QUERY] * len(DOCUMENTS), text_2=DOCUMENTS).json()
    assert each["data"] == one_to_many["data"]
    single = post(text_url, "/v1/score", model="org/ranker", text_1=QUERY, text_2=DOCUMENTS[0]).json()
    assert [one["score"] for one in single["data"]] == pytest.approx(expected[:1], abs=1e-5)


@pytest.mark.parametrize("model", ["minilm", "tiny"])
def test_embeddings_are_compared_by_their_cosine(text_url: str, model: str, minilm: Path) -> None:
    answer = post(text_url, "/v1/score", model=model, text_1=QUERY, text_2=DOCUMENTS).json()
    body = {"model": model, "input": [QUERY, *DOCUMENTS]}
    vectors = [one["embedding"] for one in post(text_url, "/v1/embeddings", **body).json()["data"]]
    cosines = [sum(a * b for a, b in zip(vectors[0], vector, strict=True)) for vector in vectors[1:]]
    assert [one["score"] for one in answer["data"]] == pytest.approx(cosines, abs=1e-6)
    if model == "minilm":
        query, *others = Embedder.load(minilm).encode([QUERY, *DOCUMENTS])
        assert cosines == pytest.approx([float(query @ one) for one in others], abs=1e-5)


def test_long_pairs_are_cut_only_where_that_is_asked_for(text_url: str, ranker_folder: Path) -> None:
    long = "d " * 60
    body: dict[str, Any] = {"model": "org/ranker", "query": QUERY, "documents": ["x", long]}
    error = post(text_url, "/v1/rerank", **body).json()["error"]
    assert error["param"] == "documents.1"
    assert error["message"].startswith("documents.1: has 68 tokens and the model reads 40")
    cut = post(text_url, "/v1/rerank", **body, truncate_prompt_tokens=-1).json()["results"]
    reference = CrossEncoder(str(ranker_folder), device="cpu").predict([(QUERY, long)])
    found = next(one["relevance_score"] for one in cut if one["index"] == 1)
    assert found == pytest.approx(float(reference[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a", {"text": "b", "title": "c"}]}, "documents.1.title"),
        ("/v1/rerank", {"query": "a", "documents": ["a", 3]}, "documents.1"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "max_chunks_per_doc": 1}, "max_chunks_per_doc"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(text_url: str, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(text_url, path, **({"model": "org/ranker"} | body))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
