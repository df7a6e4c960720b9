"""DistilBERT against transformers, every head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parity import check_fields_are_not_ignored, check_head, random_reference
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DistilBertConfig,
)

from danlu.errors import DanluError
from danlu.models.heads import MaskedLM, QuestionAnswering, SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 23,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "auto_class", "options"),
    [
        (Transformer, AutoModel, {}),
        (MaskedLM, AutoModelForMaskedLM, {"activation": "relu"}),
        (MaskedLM, AutoModelForMaskedLM, {"tie_word_embeddings": False}),
        (SequenceClassifier, AutoModelForSequenceClassification, {"num_labels": 3, "sinusoidal_pos_embds": True}),
        (TokenClassifier, AutoModelForTokenClassification, {"num_labels": 7}),
        (QuestionAnswering, AutoModelForQuestionAnswering, {}),
    ],
)
def test_distilbert(kind: type[Transformer], auto_class: Any, options: dict[str, Any], tmp_path: Path) -> None:
    check_head(kind, DistilBertConfig(**SHAPE, **options), auto_class, tmp_path)


def test_no_field_is_ignored(tmp_path: Path) -> None:
    options = {"kind": MaskedLM, "auto_class": AutoModelForMaskedLM}
    refused = check_fields_are_not_ignored(DistilBertConfig(**SHAPE), tmp_path, **options)
    assert {"dim", "n_layers", "hidden_dim"} <= refused


def test_pruned_heads_are_refused(tmp_path: Path) -> None:
    random_reference(DistilBertConfig(**SHAPE), AutoModel).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "pruned_heads": {}, "tie_weights_": True}))
    load_model(tmp_path, Transformer)
    path.write_text(json.dumps({**content, "pruned_heads": {"1": [0]}}))
    with pytest.raises(DanluError, match="pruned_heads"):
        load_model(tmp_path, Transformer)
