"""Embedders and cross-encoders as the server runs them, against sentence-transformers and transformers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tiny_cross_encoder import cross_encoder_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from danlu.errors import DanluError
from danlu.server.worker.encoders import BATCH_TOKENS, EncoderModel, batches, open_encoder, pack_vectors

TEXTS = ["hello world", "", "你好,世界", "naïve café 😀", "a " * 100, "1234567890 " * 9, "hello world"]
PAIRS = [("hello", "hello world"), ("你好", "世界"), ("a b c", ""), ("q", "w e r t y u i o p"), ("hello", "a b")]


@pytest.fixture(scope="module")
def ranker(ranker_folder: Path) -> EncoderModel:
    model = open_encoder(ranker_folder)
    assert model is not None
    return model


@pytest.fixture(scope="module")
def embedder(minilm: Path) -> EncoderModel:
    model = open_encoder(minilm)
    assert model is not None
    return model


def logits_of(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """As transformers computes them, one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        # In lists, as transformers takes a single empty text for none.
        return [float(model(**tokenizer([a], [b], return_tensors="pt")).logits) for a, b in pairs]


def test_vectors_are_those_of_sentence_transformers(embedder: EncoderModel, minilm: Path) -> None:
    reference = SentenceTransformer(str(minilm), device="cpu")
    vectors_nd, n_tokens = embedder.embed(TEXTS)
    assert np.abs(vectors_nd.numpy() - reference.encode(TEXTS)).max() < 1e-5
    assert n_tokens == sum(len(ids) for ids in reference.tokenizer(TEXTS)["input_ids"])
    assert embedder.kind == "embed"
    assert embedder.info() == {"context": 256, "vocab_size": 30522, "dim": 384}


def test_token_ids_are_read_as_they_are(embedder: EncoderModel) -> None:
    ids = embedder.tokenize("hello world", True)
    assert ids[1:-1] == embedder.tokenize("hello world", False)
    assert torch.equal(embedder.embed([ids])[0], embedder.embed(["hello world"])[0])


def test_texts_that_are_too_long_are_refused_or_cut_where_that_is_asked_for(
    embedder: EncoderModel, minilm: Path
) -> None:
    long = "word " * 300
    with pytest.raises(DanluError, match=r"^input\.1: has 302 tokens and the model reads 256"):
        embedder.embed(["short", long])
    reference = SentenceTransformer(str(minilm), device="cpu")
    cut, n_tokens = embedder.embed([long, "short"], truncate=-1)
    assert np.abs(cut.numpy() - reference.encode([long, "short"])).max() < 1e-5
    assert n_tokens == 256 + 3
    reference.max_seq_length = 10
    cut, n_tokens = embedder.embed([long], truncate=10)
    assert np.abs(cut.numpy() - reference.encode([long])).max() < 1e-5
    assert n_tokens == 10


def test_impossible_inputs_are_refused_by_their_number(embedder: EncoderModel) -> None:
    with pytest.raises(DanluError, match=r"^input\.1: has token ids outside the model's vocabulary of 30522"):
        embedder.embed([[101, 102], [30522]])
    with pytest.raises(DanluError, match=r"^input\.0: has no tokens"):
        embedder.embed([[]])
    with pytest.raises(DanluError, match="max_length: 1 has no room"):
        embedder.embed(["a"], truncate=1)


def test_similarity_of_an_embedder_is_the_cosine(embedder: EncoderModel) -> None:
    scores, n_tokens = embedder.similarity([("a cat", "a kitten"), ("a cat", "tax law"), ("a cat", "a cat")])
    vectors_nd, _ = embedder.embed(["a cat", "a kitten", "tax law"])
    products = (vectors_nd @ vectors_nd.T).tolist()
    assert scores == pytest.approx([products[0][1], products[0][2], 1.0], abs=1e-6)
    assert n_tokens == sum(len(embedder.tokenize(text, True)) for text in ("a cat", "a kitten", "tax law"))
    with pytest.raises(DanluError, match=r"^pair\.1: has 302 tokens"):
        embedder.similarity([("a", "b"), ("a", "word " * 300)])


def test_scores_of_a_cross_encoder_are_those_of_transformers(ranker: EncoderModel, ranker_folder: Path) -> None:
    scores, n_tokens = ranker.similarity(PAIRS)
    logits = torch.tensor(logits_of(ranker_folder, PAIRS))
    assert scores == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-5)
    assert np.std(scores) > 0.01  # the pairs can be told apart
    assert scores == pytest.approx(CrossEncoder(str(ranker_folder), device="cpu").predict(PAIRS).tolist(), abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(ranker_folder)
    assert n_tokens == sum(len(tokenizer([a], [b])["input_ids"][0]) for a, b in PAIRS)
    assert ranker.kind == "rank"
    assert ranker.info() == {"context": 40, "vocab_size": 120, "dim": 24}


@pytest.mark.parametrize("form", ["own file", "config.json", "old config.json"])
def test_a_cross_encoder_without_a_sigmoid_gives_its_logits(tmp_path: Path, ranker_folder: Path, form: str) -> None:
    identity = "torch.nn.modules.linear.Identity"
    CrossEncoder(str(ranker_folder), device="cpu", activation_fn=torch.nn.Identity()).save_pretrained(str(tmp_path))
    if form != "own file":
        (tmp_path / "modules.json").unlink()
        (tmp_path / "config_sentence_transformers.json").unlink()
        config = json.loads((tmp_path / "config.json").read_text())
        old = {"sbert_ce_default_activation_function": identity}
        config |= {"sentence_transformers": {"activation_fn": identity}} if form == "config.json" else old
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_encoder(tmp_path)
    assert model is not None
    assert model.similarity(PAIRS)[0] == pytest.approx(logits_of(ranker_folder, PAIRS), abs=1e-5)


def test_pairs_that_are_too_long_are_refused_or_cut(ranker: EncoderModel, ranker_folder: Path) -> None:
    long = ("a b c", "d " * 60)
    with pytest.raises(DanluError, match=r"^pair\.1: has 66 tokens and the model reads 40"):
        ranker.similarity([("a", "b"), long])
    reference = CrossEncoder(str(ranker_folder), device="cpu")
    assert ranker.similarity([long], truncate=-1)[0] == pytest.approx(reference.predict([long]).tolist(), abs=1e-5)


def test_a_cross_encoder_embeds_nothing(ranker: EncoderModel) -> None:
    with pytest.raises(DanluError, match="has no embeddings"):
        ranker.embed(["a"])


def test_a_classifier_of_several_labels_is_no_ranker(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="this is a classifier with 3 labels"):
        open_encoder(cross_encoder_folder(tmp_path, labels=3))


def test_an_unknown_activation_is_refused(tmp_path: Path, ranker_folder: Path) -> None:
    CrossEncoder(str(ranker_folder), device="cpu", activation_fn=torch.nn.Tanh()).save_pretrained(str(tmp_path))
    with pytest.raises(DanluError, match=r"makes scores with torch.nn.modules.activation.Tanh; known: "):
        open_encoder(tmp_path)


def test_models_that_write_are_left_to_the_engine(model_folder: Path, smollm2: Path, tmp_path: Path) -> None:
    assert open_encoder(model_folder) is None
    assert open_encoder(smollm2) is None
    assert open_encoder(tmp_path) is None


def test_batches_hold_every_row_once_and_stay_under_the_budget() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 600, 500)] + [2 * BATCH_TOKENS]
    found = list(batches(lengths))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= BATCH_TOKENS for batch in found)
    assert len(found) < 1.2 * sum(lengths) / BATCH_TOKENS + 2


def test_packed_vectors_can_be_shortened() -> None:
    vectors_nd = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    unpacked = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in pack_vectors(vectors_nd, None)]
    assert np.array_equal(np.stack(unpacked), vectors_nd.numpy())
    short = np.stack([np.frombuffer(base64.b64decode(text), dtype="<f4") for text in pack_vectors(vectors_nd, 3)])
    expected = vectors_nd[:, :3] / vectors_nd[:, :3].norm(dim=-1, keepdim=True)
    assert np.allclose(short, expected.numpy(), atol=1e-7)
