"""BART against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_checks import check_encoder_decoder
from parity import check_fields_are_not_ignored, close, random_ids, random_reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, BartConfig

from danlu.errors import DanluError
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "d_model": 48, "max_position_embeddings": 20, "encoder_layers": 1, "decoder_layers": 3,
    "encoder_attention_heads": 3, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 56,
}  # fmt: skip


def biased(reference: Any) -> None:
    reference.final_logits_bias.copy_(torch.randn(1, 101))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_embedding": True, "activation_function": "relu", "encoder_layers": 3, "decoder_layers": 1},
        {"activation_function": "gelu_new", "decoder_attention_heads": 6},
    ],
)
def test_bart(options: dict[str, Any], tmp_path: Path) -> None:
    model = check_encoder_decoder(BartConfig(**{**SHAPE, **options}), tmp_path, change=biased)
    assert model.head.weight is model.encoder.embed.weight is model.decoder.embed.weight


def test_untied(tmp_path: Path) -> None:
    """transformers 5 gives each stack its own embedding, and keeps one more that it does not use."""
    config = BartConfig(**SHAPE, tie_word_embeddings=False)
    model = check_encoder_decoder(config, tmp_path, change=biased, unused=("model.shared.weight",))
    assert model.encoder.embed.weight is not model.decoder.embed.weight


def test_untied_head_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    """There the stacks share their embedding whatever happens to the head, and the bias may be missing."""
    reference = random_reference(BartConfig(**SHAPE, tie_word_embeddings=False), AutoModelForSeq2SeqLM)
    with torch.no_grad():
        for stack in (reference.model.encoder, reference.model.decoder):
            stack.embed_tokens.weight.copy_(reference.model.shared.weight)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "final_logits_bias"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path, EncoderDecoder)
    assert model.encoder.embed.weight is model.decoder.embed.weight is not model.head.weight
    ids = random_ids(101, 2, 12, avoid=1)
    with torch.no_grad():
        expected = reference(input_ids=ids, decoder_input_ids=ids).logits
        close(model(ids, ids), expected, 1e-4, "untied head")


def test_positions_end(tmp_path: Path) -> None:
    """The last position of the table is used, and there is no other."""
    reference = random_reference(BartConfig(**SHAPE), AutoModelForSeq2SeqLM)
    reference.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path, EncoderDecoder), random_ids(101, 1, 21, avoid=1)
    with torch.no_grad():
        expected = reference(input_ids=ids[:, :20], decoder_input_ids=ids[:, :20]).logits
        close(model(ids[:, :20], ids[:, :20]), expected, 1e-4, "20 positions")
        with pytest.raises(DanluError, match="21 tokens is longer than the model's table of 20"):
            model(ids, ids[:, :20])


def test_no_field_is_ignored(tmp_path: Path) -> None:
    config = BartConfig(**{**SHAPE, "decoder_layers": 1})
    check_fields_are_not_ignored(config, tmp_path, kind=EncoderDecoder, auto_class=AutoModelForSeq2SeqLM, lowest_id=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("normalize_before", True), ("add_final_layer_norm", True), ("normalize_embedding", False), ("is_decoder", True),
     ("static_position_embeddings", True), ("activation_function", "mish"), ("num_hidden_layers", 5)],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    random_reference(BartConfig(**SHAPE), AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(DanluError, match=rf"config\.json: {field} is"):
        load_model(tmp_path, EncoderDecoder)


def test_other_heads_are_refused(tmp_path: Path) -> None:
    random_reference(BartConfig(**SHAPE), AutoModelForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match=r"holds classification_head\.dense\.bias, which config.json has no place for"):
        load_model(tmp_path, EncoderDecoder)
