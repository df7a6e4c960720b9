"""The real models that danlu knows by name. Without a package index the tests that need them are skipped, but in CI
they fail: a check that is never made proves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.hub.config import PullConfig
from danlu.hub.pull import pull


def pulled(name: str) -> Path:
    """The folder that `danlu pull NAME` gives."""
    try:
        return pull(PullConfig(source=name))
    except DanluError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{name} cannot be fetched ({error})")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Q4_1 GGUF file."""
    return next(pulled("smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a folder in the layout of sentence-transformers."""
    return pulled("minilm")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are random, so greedy answers are babble, and never end by themselves: stop tokens have logit 0."""
    import torch  # here, so that tests of other things start fast

    from danlu.models.causal_lm import CausalLM
    from danlu.models.load import save_model
    from danlu.nn.config import ModelConfig, Rope
    from danlu.tokenizer.train import train_on

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
