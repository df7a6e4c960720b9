"""Phi-3 and later against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    check_causal_lm,
    check_every_head,
    check_fields_are_not_ignored,
    close,
    padding,
    random_ids,
    random_reference,
)
from transformers import AutoModelForCausalLM, Phi3Config

from danlu.errors import DanluError
from danlu.models.load import load_model
from danlu.nn.kv_cache import KVCache

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 64, "original_max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def longrope(n: int, **more: Any) -> dict[str, Any]:
    """LongRoPE for heads of which 2 n dimensions are rotated."""
    factors = {"short_factor": [1 + i / n for i in range(n)], "long_factor": [2.0 + 3 * i for i in range(n)]}
    return {"type": "longrope", **factors, **more}


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 7, "hidden_act": "gelu"},
        {"partial_rotary_factor": 0.75, "rope_scaling": longrope(6), "rope_theta": 500.0, "sliding_window": 5},
        {"rope_scaling": longrope(8, attention_factor=1.3), "num_key_value_heads": 1},
        {"head_dim": 24, "partial_rotary_factor": 2 / 3},
    ],
)
def test_phi3(options: dict[str, Any], tmp_path: Path) -> None:
    check_causal_lm(Phi3Config(**{**SHAPE, **options}), tmp_path)


def test_long_factors_count_beyond_the_original_context(tmp_path: Path) -> None:
    """Also with a cache, once it holds more than the original context, and with padding."""
    config = Phi3Config(**{**SHAPE, "original_max_position_embeddings": 8}, rope_scaling=longrope(8))
    reference = random_reference(config, AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    ids = random_ids(101, 3, 24, avoid=0)
    with torch.no_grad():
        for length in (8, 9, 24):
            close(model(ids[:, :length]), reference(ids[:, :length]).logits, 1e-4, f"{length} tokens")
        real = padding("left", 3, 24)
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        expected = reference(ids, attention_mask=real.long(), position_ids=positions).logits
        close(model(ids, real_bt=real)[real], expected[real], 1e-4, "padding")
        cache = KVCache(model.config, 3, 24)
        pieces = [model(piece, cache=cache) for piece in ids.split([9, 5, 1, 9], dim=1)]
        close(torch.cat(pieces, dim=1), reference(ids).logits, 1e-4, "cache")


def test_heads(tmp_path: Path) -> None:
    check_every_head(Phi3Config(**SHAPE), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 4, "num_key_value_heads": 1},
        {"original_max_position_embeddings": 8, "rope_scaling": longrope(8)},
    ],
)
def test_fields(options: dict[str, Any], tmp_path: Path) -> None:
    refused = check_fields_are_not_ignored(Phi3Config(**{**SHAPE, **options}), tmp_path)
    assert refused == {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "is_encoder_decoder", "tie_word_embeddings",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_published_configs(kind: str, tmp_path: Path) -> None:
    """As Phi-3-mini-128k and Phi-4-mini are published."""
    config = Phi3Config(**SHAPE, rope_scaling=longrope(6), partial_rotary_factor=0.75)
    reference = random_reference(config, AutoModelForCausalLM)
    reference.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    content.update(
        rope_scaling={**longrope(6), "type": kind}, rope_theta=10000.0, partial_rotary_factor=0.75, full_attn_mod=1,
        interpolate_factor=1, lm_head_bias=False, mlp_bias=False, attention_bias=False, sliding_window=262144,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    ids = random_ids(101, 2, 24, avoid=0)
    torch.testing.assert_close(load_model(tmp_path)(ids), reference(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"full_attn_mod": 2}, "full_attn_mod is 2"),
        ({"lm_head_bias": True}, "lm_head_bias: not known"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": longrope(8), "original_max_position_embeddings": None}, "position_embeddings is missing"),
        ({"rope_parameters": longrope(7)}, "must hold 8 numbers each"),
    ],
)
def test_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_reference(Phi3Config(**SHAPE), AutoModelForCausalLM).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **fields}))
    with pytest.raises(DanluError, match=message):
        load_model(tmp_path)
