"""RoBERTa and XLM-RoBERTa against transformers, every head; positions start behind the padding id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_fields_are_not_ignored, check_head, close, random_ids, random_reference
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    RobertaConfig,
    XLMRobertaConfig,
)

from danlu.errors import DanluError
from danlu.models.heads import MaskedLM, QuestionAnswering, SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 103, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 27, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
POOLER = ("pooler.dense.weight", "pooler.dense.bias")


@pytest.mark.parametrize(
    ("kind", "auto_class", "options"),
    [
        (Transformer, AutoModel, {"pad_token_id": 3}),
        (MaskedLM, AutoModelForMaskedLM, {}),
        (MaskedLM, AutoModelForMaskedLM, {"hidden_act": "relu", "pad_token_id": 0}),  # the head has gelu all the same
        (MaskedLM, AutoModelForMaskedLM, {"tie_word_embeddings": False, "type_vocab_size": 2}),
        (SequenceClassifier, AutoModelForSequenceClassification, {"num_labels": 3}),
        (TokenClassifier, AutoModelForTokenClassification, {"num_labels": 4}),
        (QuestionAnswering, AutoModelForQuestionAnswering, {}),
    ],
)
@pytest.mark.parametrize("config_class", [RobertaConfig, XLMRobertaConfig])
def test_roberta(
    config_class: Any, kind: type[Transformer], auto_class: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    unused = POOLER if kind is Transformer else ("lm_head.bias",) if "tie_word_embeddings" in options else ()
    check_head(kind, config_class(**{**SHAPE, **options}), auto_class, tmp_path, unused=unused)


def test_no_field_is_ignored(tmp_path: Path) -> None:
    """Tokens below 20 are left to be padding, which RoBERTa knows by its id and we by the mask."""
    options = {"kind": MaskedLM, "auto_class": AutoModelForMaskedLM, "lowest_id": 20}
    refused = check_fields_are_not_ignored(RobertaConfig(**SHAPE, pad_token_id=2), tmp_path, **options)
    assert {"is_decoder", "add_cross_attention", "max_position_embeddings"} <= refused


def test_the_longest_text_fits(tmp_path: Path) -> None:
    reference = random_reference(RobertaConfig(**SHAPE), AutoModel)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, Transformer)
    assert model.config.context == 27 - 2
    ids = random_ids(103, 1, 25, avoid=1)
    with torch.no_grad():
        close(model.hidden_states(ids), reference(ids).last_hidden_state, 1e-4, "all positions")


def test_no_positions_are_left(tmp_path: Path) -> None:
    random_reference(RobertaConfig(**SHAPE), AutoModel).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 30}))
    with pytest.raises(DanluError, match="max_position_embeddings is 27; positions start at 31"):
        load_model(tmp_path, Transformer)


def test_classification_does_not_depend_on_the_side_of_the_padding(tmp_path: Path) -> None:
    reference = random_reference(RobertaConfig(**SHAPE), AutoModelForSequenceClassification)
    reference.save_pretrained(tmp_path)
    ids, real = random_ids(103, 1, 12, avoid=1), torch.arange(12)[None] >= 5
    with torch.no_grad():
        theirs = reference(ids[:, 5:]).logits
        close(load_model(tmp_path, SequenceClassifier)(ids, real), theirs, 1e-4, "padding on the left")
