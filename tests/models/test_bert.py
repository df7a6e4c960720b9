"""BERT against transformers: every head, tied and untied, pairs and padding; and how old checkpoints are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_fields_are_not_ignored, check_head, close, random_ids, random_reference
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
)

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import MaskedLM, QuestionAnswering, SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 31, "type_vocab_size": 3, "layer_norm_eps": 1e-3,
}  # fmt: skip
POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def test_stack(tmp_path: Path) -> None:
    check_head(Transformer, BertConfig(**SHAPE), AutoModel, tmp_path, unused=POOLER)


@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu_new", "type_vocab_size": 1}, {"hidden_act": "relu"}])
def test_masked_lm(options: dict[str, Any], tmp_path: Path) -> None:
    check_head(MaskedLM, BertConfig(**{**SHAPE, **options}), AutoModelForMaskedLM, tmp_path)


def test_untied_masked_lm(tmp_path: Path) -> None:
    config = BertConfig(**SHAPE, tie_word_embeddings=False)
    check_head(MaskedLM, config, AutoModelForMaskedLM, tmp_path, unused=("cls.predictions.bias",))


def test_sequence_classification(tmp_path: Path) -> None:
    config = BertConfig(**SHAPE, num_labels=3)
    check_head(SequenceClassifier, config, AutoModelForSequenceClassification, tmp_path)


def test_token_classification(tmp_path: Path) -> None:
    config = BertConfig(**SHAPE, num_labels=5)
    check_head(TokenClassifier, config, AutoModelForTokenClassification, tmp_path)


def test_question_answering(tmp_path: Path) -> None:
    check_head(QuestionAnswering, BertConfig(**SHAPE), AutoModelForQuestionAnswering, tmp_path)


def test_no_field_is_ignored(tmp_path: Path) -> None:
    """The padding id is a mask's business here."""
    options = {"kind": MaskedLM, "auto_class": AutoModelForMaskedLM}
    refused = check_fields_are_not_ignored(BertConfig(**SHAPE), tmp_path, **options)
    assert {"is_decoder", "add_cross_attention", "vocab_size", "num_hidden_layers"} <= refused


@pytest.mark.parametrize(
    "field",
    [{"is_decoder": True}, {"add_cross_attention": True}, {"position_embedding_type": "relative_key"},
     {"pruned_heads": {"0": [1]}}, {"pooler_type": "mean"}, {"embedding_size": 16}],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(field: dict[str, Any], tmp_path: Path) -> None:
    random_reference(BertConfig(**SHAPE), AutoModel).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **field}))
    with pytest.raises(DanluError, match=f"config.json: {next(iter(field))}"):
        load_model(tmp_path, Transformer)


def test_is_no_causal_model(tmp_path: Path) -> None:
    random_reference(BertConfig(**SHAPE), AutoModel).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match="no head for causal lm"):
        load_model(tmp_path, CausalLM)


def test_checkpoint_of_pre_training(tmp_path: Path) -> None:
    """Two heads, the position buffer of old versions, and the first names of norms: what is not asked for stays out."""
    reference = random_reference(BertConfig(**SHAPE), AutoModelForPreTraining)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "cls.seq_relationship.weight" in tensors
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(31)[None]
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in tensors.items()}  # fmt: skip
    save_file(old, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    chinese = {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
               "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
               "position_embedding_type": "absolute", "gradient_checkpointing": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**config, **chinese}))

    ids = random_ids(101, 2, 9)
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        close(load_model(tmp_path, MaskedLM)(ids), expected.prediction_logits, 1e-4, "masked LM")
        hidden = load_model(tmp_path, Transformer).hidden_states(ids)
        close(hidden, expected.hidden_states[-1], 1e-4, "stack")
        classifier = load_model(tmp_path, SequenceClassifier, new_head=True, labels=("a", "b"))
        close(classifier.pooler.weight, reference.bert.pooler.dense.weight, 1e-9, "the pooler is taken over")


def test_base_checkpoint_without_prefix(tmp_path: Path) -> None:
    reference = random_reference(BertConfig(**SHAPE), AutoModel)
    reference.save_pretrained(tmp_path)
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "model.safetensors")
    ids = random_ids(101, 2, 9)
    with torch.no_grad():
        classifier = load_model(tmp_path, SequenceClassifier, new_head=True, labels=("x", "y", "z"))
        pooled = torch.tanh(classifier.pooler(classifier.hidden_states(ids)[:, 0]))
        close(pooled, reference(ids).pooler_output, 1e-4, "pooler")
    with pytest.raises(DanluError, match=r"lacks classifier\.bias"):
        load_model(tmp_path, SequenceClassifier)


def test_first_real_token_with_padding_on_the_left(tmp_path: Path) -> None:
    """transformers would classify the padding; we classify [CLS], at the position that BERT gives it there."""
    reference = random_reference(BertConfig(**SHAPE), AutoModelForSequenceClassification)
    reference.save_pretrained(tmp_path)
    ids, real = random_ids(101, 1, 12), torch.arange(12)[None] >= 5
    with torch.no_grad():
        theirs = reference(ids[:, 5:], position_ids=torch.arange(5, 12)[None]).logits
        close(load_model(tmp_path, SequenceClassifier)(ids, real), theirs, 1e-4, "padding on the left")
