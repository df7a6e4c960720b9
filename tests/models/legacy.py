"""A `config.json` as older versions and other tools wrote it, taken word for word, against what `transformers` makes of
the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from parity import close, random_ids, random_reference

from danlu.models.causal_lm import CausalLM
from danlu.models.family import family_for
from danlu.models.hf_config import HFConfig
from danlu.models.load import load_model
from danlu.nn.config import ModelConfig


def check_config_json(content: dict[str, Any], folder: Path, *, t: int = 24, atol: float = 1e-4) -> CausalLM:
    """Both read ``content``, and compute the same in one pass; returns our model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(content)
    (folder / "config.json").write_text(written)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.float32  # buffers that were made in bfloat16 would stay rounded
    reference = random_reference(config, AutoModelForCausalLM)
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(written)
    model = load_model(folder)
    ids = random_ids(config.vocab_size, 3, t, avoid=config.pad_token_id)
    with torch.no_grad():
        expected = reference(ids).logits
        assert expected.std() > 0.1, "the reference is too quiet to show a difference"
        close(model(ids), expected, atol, "one pass")
    return model


def read_config_json(content: dict[str, Any]) -> ModelConfig:
    """The shape, as :func:`load_model` reads it before it looks at any weights."""
    hf, family = HFConfig(content, "config.json"), family_for(content, "config.json")
    config = family.read(hf)
    hf.finish(family.harmless)
    assert isinstance(config, ModelConfig)
    return config
