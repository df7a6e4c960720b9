"""T5, T5 v1.1 and Flan-T5 against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_checks import check_encoder_decoder
from parity import check_fields_are_not_ignored, close, random_ids, random_reference
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model
from danlu.models.transformer import Transformer

# Heads are wider together than the model, the stacks differ in depth, and distances outgrow their buckets.
SHAPE: dict[str, Any] = {
    "vocab_size": 101, "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 10, "relative_attention_max_distance": 11, "decoder_start_token_id": 0,
}  # fmt: skip


def own_head(reference: Any) -> None:
    """transformers 5 ties the head of every T5 that it makes; those that were trained have one of their own."""
    reference.lm_head.weight = nn.Parameter(torch.randn_like(reference.shared.weight) * 0.15)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_norm_epsilon": 1e-3, "feed_forward_proj": "gelu", "num_decoder_layers": None},
        {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "relative_attention_max_distance": 6},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
    ],
)
def test_t5(options: dict[str, Any], tmp_path: Path) -> None:
    model = check_encoder_decoder(T5Config(**{**SHAPE, **options}), tmp_path)
    assert model.head.weight is model.shared.weight


def test_t5_v1_1(tmp_path: Path) -> None:
    config = T5Config(**SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = check_encoder_decoder(config, tmp_path, change=own_head)
    assert model.head.weight is not model.shared.weight


def test_unscaled_head_that_is_tied(tmp_path: Path) -> None:
    model = check_encoder_decoder(T5Config(**SHAPE, tie_word_embeddings=False), tmp_path)
    assert model.head.weight is model.shared.weight


def test_flan_t5_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    """The config of Flan-T5, and a file that holds the embedding three times."""
    content = {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 40, "d_kv": 12, "d_model": 32,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 2, "num_heads": 4, "num_layers": 2, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 20, "relative_attention_num_buckets": 8,
        "task_specific_params": {"summarization": {"num_beams": 4}}, "tie_word_embeddings": False,
        "transformers_version": "4.23.1", "use_cache": True, "vocab_size": 101,
    }  # fmt: skip
    reference = random_reference(T5Config(**content), AutoModelForSeq2SeqLM)
    own_head(reference)
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    tensors = load_file(tmp_path / "model.safetensors")
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = random_ids(101, 2, 30, avoid=0)
    with torch.no_grad():
        expected = reference(input_ids=ids, decoder_input_ids=ids).logits
        close(load_model(tmp_path, EncoderDecoder)(ids, ids), expected, 1e-4, "Flan-T5")

    del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        close(load_model(tmp_path, EncoderDecoder)(ids, ids), expected, 1e-4, "without the shared embedding")

    tensors["decoder.embed_tokens.weight"][3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DanluError, match=r"decoder\.embed_tokens\.weight is not the tensor .* ties it to"):
        load_model(tmp_path, EncoderDecoder)


def test_no_field_is_ignored(tmp_path: Path) -> None:
    config = T5Config(**{**SHAPE, "num_layers": 1, "num_decoder_layers": 1})
    check_fields_are_not_ignored(config, tmp_path, kind=EncoderDecoder, auto_class=AutoModelForSeq2SeqLM)


@pytest.mark.parametrize(
    ("field", "value"),
    [("feed_forward_proj", "gated-gelu-x"), ("feed_forward_proj", "mish"), ("is_decoder", True), ("new_field", 1),
     ("relative_attention_num_buckets", 3), ("relative_attention_max_distance", 2), ("decoder_start_token_id", 101)],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    random_reference(T5Config(**SHAPE), AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content = {key: item for key, item in content.items() if key not in ("dense_act_fn", "is_gated_act")}
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(DanluError, match=r"config\.json: "):
        load_model(tmp_path, EncoderDecoder)


def test_it_opens_as_an_encoder_decoder_only(tmp_path: Path) -> None:
    random_reference(T5Config(**SHAPE), AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    with pytest.raises(DanluError, match="no head for causal lm"):
        load_model(tmp_path, CausalLM)
    with pytest.raises(DanluError, match="opens as EncoderDecoder"):
        load_model(tmp_path, Transformer)


def test_gradient_checkpointing_runs_every_block_again_and_changes_nothing(tmp_path: Path) -> None:
    random_reference(T5Config(**SHAPE), AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    ids = random_ids(101, 2, 9)
    gradients, runs = [], []
    for on in (False, True):
        model = load_model(tmp_path, EncoderDecoder).train()
        model.gradient_checkpointing = on
        blocks = [*model.encoder.layers, *model.decoder.layers]
        seen: list[nn.Module] = []
        for block in blocks:
            block.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module))
        model(ids, ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        runs.append({seen.count(block) for block in blocks})
    assert runs == [{1}, {2}]
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_size_and_work(tmp_path: Path) -> None:
    reference = random_reference(T5Config(**SHAPE), AutoModelForSeq2SeqLM)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, EncoderDecoder)
    assert model.num_parameters() == reference.num_parameters()
    embedding = model.shared.weight.numel()
    matrices = sum(p.numel() for name, p in reference.named_parameters() if p.ndim == 2 and "bias" not in name)
    scores = 12 * 4 * 12 * (2 + 3 + 3)  # self-attention of 2 and of 3 layers, cross-attention of 3
    assert model.estimate_flops(16) == 6 * (matrices - embedding) + 6 * embedding + scores * 16
