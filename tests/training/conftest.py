"""A small corpus, tokenizer and data folder, made once by the real verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from danlu.data.build import build_data
from danlu.data.config import DataConfig
from danlu.tokenizer.config import TokenizerConfig
from danlu.tokenizer.train import train_tokenizer
from danlu.training.config import PretrainConfig


@dataclasses.dataclass
class Workbench:
    """Folders made from one corpus, and the smallest config that trains on them."""

    root: Path
    data: Path
    tokenizer: Path

    def config(self, out: Path, **changes: object) -> PretrainConfig:
        values: dict[str, object] = {
            "data": self.data,
            "tokenizer": self.tokenizer,
            "out": out,
            "size": 1,
            "dim": 32,
            "seq_len": 64,
            "context": 128,
            "batch_tokens": 512,
            "steps": 12,
            "log_to": (),
            "compile": "never",
            "device": "cpu",
            "precision": "fp32",  # the oracles are exact; bf16 hardware would pick its own
            "heldout_tokens": 1024,
        }
        return PretrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    root = tmp_path_factory.mktemp("workbench")
    corpus = root / "corpus"
    corpus.mkdir()
    for i in range(60):
        lines = [
            f"def function_{i}_{k}(first, second):\n    return first * {i} + second - {k}\n" for k in range(i % 9 + 3)
        ]
        (corpus / f"module_{i}.py").write_text(f'"""Module {i} of the corpus."""\n\n' + "\n\n".join(lines))
    build_data(DataConfig(corpus=(str(corpus),), out=root / "data", dedup="exact", heldout=0.1))
    train_tokenizer(TokenizerConfig(data=root / "data", out=root / "tokenizer", vocab_size=360))
    return Workbench(root, root / "data", root / "tokenizer")


@pytest.fixture
def make_config(workbench: Workbench, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Configs with an output folder of their own."""

    def make(name: str = "model", **changes: object) -> PretrainConfig:
        return workbench.config(tmp_path / name, **changes)

    return make
