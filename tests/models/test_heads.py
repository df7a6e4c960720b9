"""Heads on decoders against transformers; labels, problem types and fresh heads on any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_head, close, padding, random_ids, random_reference
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import MaskedLM, QuestionAnswering, RewardModel, SequenceClassifier, TokenClassifier
from danlu.models.load import load_model, save_model
from danlu.models.transformer import Transformer

LLAMA: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DECODERS = {
    "llama": LlamaConfig(**LLAMA),
    "qwen3, tied": Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=32, pad_token_id=0),
}
BERT = BertConfig(
    vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, num_labels=3
)


def with_labels(config: Any, number: int) -> Any:
    copy = type(config).from_dict(config.to_dict())
    copy.num_labels = number
    return copy


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("kind", "auto_class", "labels"),
    [
        (Transformer, AutoModel, 2),
        (SequenceClassifier, AutoModelForSequenceClassification, 3),
        (RewardModel, AutoModelForSequenceClassification, 1),
        (TokenClassifier, AutoModelForTokenClassification, 5),
    ],
)
def test_heads_on_decoders(name: str, kind: type[Transformer], auto_class: Any, labels: int, tmp_path: Path) -> None:
    check_head(kind, with_labels(DECODERS[name], labels), auto_class, tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_does_not_depend_on_the_padding(side: str, tmp_path: Path) -> None:
    random_reference(with_labels(DECODERS["llama"], 1), AutoModelForSequenceClassification).save_pretrained(tmp_path)
    model = load_model(tmp_path, RewardModel)
    ids, real = random_ids(101, 3, 14), padding(side, 3, 14)
    with torch.no_grad():
        batch = model.score(ids, real)
        alone = torch.cat([model.score(row[mask][None]) for row, mask in zip(ids, real, strict=True)])
    assert batch.shape == (3,)
    close(batch, alone, 1e-5, "alone")


@pytest.mark.parametrize(
    ("problem_type", "labels", "expected"),
    [
        (None, ("a", "b", "c"), lambda x: x.softmax(-1)),
        ("single_label_classification", ("a", "b"), lambda x: x.softmax(-1)),
        ("multi_label_classification", ("a", "b", "c"), torch.sigmoid),
        ("regression", ("valence", "arousal"), lambda x: x),
        (None, ("stars",), lambda x: x),
    ],
)
def test_a_fresh_head_is_saved_with_its_labels(
    problem_type: Any, labels: tuple[str, ...], expected: Any, tmp_path: Path
) -> None:
    random_reference(BERT, AutoModelForMaskedLM).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", SequenceClassifier, new_head=True, labels=labels, problem_type=problem_type)
    ids = random_ids(101, 4, 9)
    with torch.no_grad():
        logits = model(ids)
        close(model.probabilities(logits), expected(logits), 1e-6, "probabilities")
        save_model(model, tmp_path / "ours")
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        close(logits, theirs(ids).logits, 1e-4, "opened by transformers")
    assert type(theirs).__name__ == "BertForSequenceClassification"
    assert theirs.config.id2label == dict(enumerate(labels))
    assert theirs.config.label2id == {label: i for i, label in enumerate(labels)}
    assert theirs.config.num_labels == len(labels)
    assert theirs.config.problem_type == problem_type
    again = load_model(tmp_path / "ours", SequenceClassifier)
    assert (again.labels, again.problem_type) == (labels, problem_type)


def test_a_fresh_head_on_a_language_model(tmp_path: Path) -> None:
    random_reference(DECODERS["llama"], AutoModelForCausalLM).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match=r"lacks score\.weight"):
        load_model(tmp_path, SequenceClassifier, labels=("spam", "ham"))
    model = load_model(tmp_path, TokenClassifier, new_head=True, labels=("O", "B-NAME", "I-NAME"))
    save_model(model, tmp_path / "ours")
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "ours")
    ids = random_ids(101, 2, 9)
    with torch.no_grad():
        close(model(ids), theirs(ids).logits, 1e-4, "opened by transformers")
    assert theirs.config.id2label == {0: "O", 1: "B-NAME", 2: "I-NAME"}


def test_another_number_of_labels_takes_a_fresh_head(tmp_path: Path) -> None:
    random_reference(BERT, AutoModelForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match=r"classifier.weight has shape \(3, 48\)"):
        load_model(tmp_path, SequenceClassifier, labels=("a", "b", "c", "d"))
    model = load_model(tmp_path, SequenceClassifier, labels=("a", "b", "c", "d"), new_head=True)
    assert model(random_ids(101, 2, 5)).shape == (2, 4)
    kept = load_model(tmp_path, SequenceClassifier, labels=("a", "b", "c"), new_head=True)
    close(kept.head.weight, load_model(tmp_path, SequenceClassifier).head.weight, 1e-9, "a head that fits is kept")


def test_a_head_of_the_same_name_is_not_mistaken(tmp_path: Path) -> None:
    """BERT calls the weights of its sequence and token classifiers alike."""
    random_reference(BERT, AutoModelForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match=r"lacks classifier\.bias"):
        load_model(tmp_path, TokenClassifier)
    theirs = load_model(tmp_path, SequenceClassifier).head.weight
    fresh = load_model(tmp_path, TokenClassifier, new_head=True).head.weight
    assert fresh.shape == theirs.shape
    assert not torch.equal(fresh, theirs)


def test_question_answering_on_a_classifier_has_two_logits(tmp_path: Path) -> None:
    random_reference(BERT, AutoModelForSequenceClassification).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", QuestionAnswering, new_head=True)
    save_model(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    load_model(tmp_path / "ours", QuestionAnswering)


def test_a_classifier_of_three_is_no_reward_model(tmp_path: Path) -> None:
    random_reference(BERT, AutoModelForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match=r"config.json: a reward model gives one number; .* 3 labels"):
        load_model(tmp_path, RewardModel)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must give a label"),
        ({"id2label": ["a", "b"]}, "id2label must give a label"),
        ({"id2label": {"0": "a", "1": 7}}, "one name for each label"),
        ({"id2label": {"0": "a", "1": "a"}}, "named twice"),
        ({"id2label": {}}, "one name for each label"),
        ({"id2label": None, "num_labels": True}, "num_labels is True"),
        ({"id2label": None, "num_labels": 0}, "num_labels is 0"),
        ({"problem_type": "guess"}, "problem_type is 'guess'"),
    ],
)
def test_broken_labels_are_told(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_reference(BERT, AutoModelForSequenceClassification).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(DanluError, match=message) as error:
        load_model(tmp_path, SequenceClassifier)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("labels", [(), "spam", ("a", "a"), (1, 2)])
def test_labels_that_cannot_be_told_apart(labels: Any, tmp_path: Path) -> None:
    random_reference(BERT, AutoModelForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match="labels"):
        load_model(tmp_path, TokenClassifier, new_head=True, labels=labels)


def test_flops_count_the_head(tmp_path: Path) -> None:
    random_reference(BERT, AutoModelForMaskedLM).save_pretrained(tmp_path)
    stack, model = load_model(tmp_path, Transformer), load_model(tmp_path, MaskedLM)
    assert model.estimate_flops(16) - stack.estimate_flops(16) == 6 * 48 * (101 + 48)


def test_a_tied_head_is_a_fresh_one_without_its_matrix(tmp_path: Path) -> None:
    """A new masked-LM head on a bare encoder is tied to the embedding that is there."""
    random_reference(BERT, AutoModel).save_pretrained(tmp_path)
    model = load_model(tmp_path, MaskedLM, new_head=True)
    assert model.head.weight is model.embed.weight
    with pytest.raises(DanluError, match="have no head for causal lm"):
        load_model(tmp_path, CausalLM)
