"""A model folder as users have one, tiny and untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.models.causal_lm import CausalLM
from danlu.models.load import save_model
from danlu.nn.config import ModelConfig, Rope
from danlu.tokenizer.train import train_on


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are random, so greedy answers are babble, and never end by themselves: stop tokens have logit 0."""
    texts = [f"def f{i}(x):\n    return x + {i}  # 丹炉 refines text\n" for i in range(200)]
    tokenizer = train_on(texts, 320, 2)
    config = ModelConfig(
        qk_norm="head",
        rope=Rope(),
        vocab_size=320,
        n_layers=1,
        dim=32,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        ffn_dim=32,
        context=4096,
    )
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3, generator=generator)
        model.embed.weight[list(tokenizer.stop_ids)] = 0
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny random model of transformers, whose answers end at different lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.35)
    return model
